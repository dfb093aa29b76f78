"""In training MLX hands kernels to an NVIDIA GPU one by one; what the user has set stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_impl.machine.cuda import IN_TRAINING

ROOT = Path(__file__).resolve().parents[2]
SHOW = "import json, os; print(json.dumps(dict(os.environ)))"


def environment_after(code: str, **given: str) -> dict[str, str]:
    """Of a process of its own, such of IN_TRAINING as are set."""
    clean = {name: value for name, value in os.environ.items() if name not in IN_TRAINING}
    command = [sys.executable, "-c", f"{code}; {SHOW}"]
    environment = {**clean, **given}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: found[name] for name in IN_TRAINING if name in found}


@pytest.mark.skipif(sys.platform != "linux", reason="CUDA is on Linux; Metal has one of these variables too")
def test_a_program_that_trains_sets_what_mlx_reads() -> None:
    assert IN_TRAINING["MLX_USE_CUDA_GRAPHS"] == "0"
    assert environment_after("from mlx_impl import LoRATrainer") == IN_TRAINING
    command = "from mlx_impl.__main__ import main; main(['train', '--iters', '0'])"
    assert environment_after(command) == IN_TRAINING


def test_what_the_user_has_set_stays() -> None:
    given = dict.fromkeys(IN_TRAINING, "7")
    assert environment_after("from mlx_impl import LoRATrainer", **given) == given


def test_without_training_nothing_is_set() -> None:
    assert environment_after("import mlx_impl; from mlx_impl import load_model, answer") == {}
    modules = "answerer, evaluate, generate"
    assert environment_after(f"from mlx_impl.cli import {modules}; import mlx_impl.run.memory_check") == {}


def test_a_mac_is_left_alone() -> None:
    code = "import sys; sys.platform = 'darwin'; from mlx_impl.machine import cuda"
    assert environment_after(f"{code}; cuda.launch_kernels_one_by_one()") == {}
