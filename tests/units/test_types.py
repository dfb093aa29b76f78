"""mypy with this project's settings: what MLX returns has a type, and a wrong program is an error."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

RIGHT = """
import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mlx_impl.config import ModelConfig, TrainConfig
from mlx_impl.lora import lora_parameters
from mlx_impl.model import CausalLM
from mlx_impl.optim import LoRAOptimizer

@mx.custom_function
def doubled(x: mx.array) -> mx.array:
    return x + x

@doubled.vjp
def _gradient(x: mx.array, d: mx.array, y: mx.array) -> mx.array:
    return 2 * d

def right(x: mx.array, model: CausalLM, config: TrainConfig) -> float:
    LoRAOptimizer(config).update(model, tree_map(mx.zeros_like, model.trainable_parameters()))
    arrays = mx.load("a.safetensors")
    arrays |= lora_parameters(model)
    size = sum(array.size for _, array in tree_flatten(model.parameters()))
    total: float = mx.checkpoint(mx.compile(doubled))(x).sum().item()
    return total / size

def wrong(x: mx.array, model: CausalLM, config: TrainConfig) -> None:
"""
WRONG = {  # a statement, and its error
    "mx.array([1]).no_such_method()": '"array" has no attribute "no_such_method"',
    "(x @ x).sum().no_such_method()": '"array" has no attribute "no_such_method"',
    "mx.no_such_function(x)": 'Module has no attribute "no_such_function"',
    "LoRAOptimizer('adamw')": 'Argument 1 to "LoRAOptimizer" has incompatible type "str"',
    "model.no_such_layer": '"CausalLM" has no attribute "no_such_layer"',
    "model('text')": 'Argument 1 to "__call__" of "CausalLM" has incompatible type "str"',
    "model.lm_head(1)": 'Argument 1 to "__call__" of "Linear" has incompatible type "int"',
    "for _, _ in model.trainable_parameters(): pass": "Unpacking a string is disallowed",
    "tree_flatten(model)[0][1].no_such_method()": '"array" has no attribute "no_such_method"',
    "mx.load('a.safetensors').no_such_method()": '"dict[str, array]" has no attribute "no_such_method"',
    "doubled('text')": 'Argument 1 to "doubled" has incompatible type "str"',
    "mx.compile(doubled)(x, x)": "Too many arguments",
    "mx.checkpoint(doubled)(x).no_such_method()": '"array" has no attribute "no_such_method"',
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What mypy says of each line that it finds wrong. The repository's mypy cache saves time."""
    program = tmp_path_factory.mktemp("typed") / "typed_program.py"
    text = RIGHT + "".join(f"    {statement}\n" for statement in WRONG)
    program.write_text(text)
    settings = ["--config-file", str(ROOT / "pyproject.toml"), "--no-error-summary", "--no-pretty"]
    command = [sys.executable, "-m", "mypy", *settings, str(program)]
    report = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    # Of an unchanged program the cache replays the errors, with the path that it had at first.
    found = re.findall(r"typed_program\.py:(\d+): error: (.*)$", report.stdout, re.MULTILINE)
    assert report.stdout.count(" error: ") == len(found), report.stdout + report.stderr
    return {text.splitlines()[int(line) - 1].strip(): message for line, message in found}


def test_every_wrong_statement_is_an_error_and_nothing_else_is(errors: dict[str, str]) -> None:
    assert errors.keys() == WRONG.keys()


@pytest.mark.parametrize("statement", WRONG)
def test_the_error_says_what_is_wrong(statement: str, errors: dict[str, str]) -> None:
    assert WRONG[statement] in errors[statement]
