"""The README's PyTorch adapter and its way to feed the ladder's batches are right."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tests.lora_ladder
from reference.lora import add_lora
from reference.model import CausalLM
from tests.lora_ladder.cases import named_case
from tests.lora_ladder.command import main
from tests.trainers.reference import Float32Reference

README = (Path(tests.lora_ladder.__file__).parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
CLAIMS = (
    "test_02_layer.py::test_the_trainable_count_is_rank_times_inputs_plus_outputs[untied]",
    "test_05_loss.py::test_the_loss_equals_the_reference[untied]",
    "test_06_gradient.py::test_every_gradient_equals_the_reference[untied]",
    "test_08_step.py::test_one_update_equals_the_reference[adamw]",
)


def build(spec: Any, lora: Any) -> CausalLM:
    model = CausalLM(spec)
    if lora is not None:
        add_lora(model, lora)
    return model


def fit(model: CausalLM, windows: Any, training: Any) -> list[float]:
    """The reference's loop, on this model."""
    trainer = Float32Reference.__new__(Float32Reference)
    trainer.model, trainer.saved, trainer.first_update = model, None, 0
    return trainer.train(windows, training)


def test_the_pytorch_adapter_of_the_readme_passes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (text,) = [block for block in BLOCKS if "from my_code import" in block]
    modules: dict[str, Any] = {"lora_ladder": tests.lora_ladder, "my_code": types.ModuleType("my_code")}
    vars(modules["my_code"]).update(build=build, fit=fit)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "readme_adapter.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["readme_adapter:MyTrainer", *CLAIMS]) == 0, capsys.readouterr().out
    assert "no divergence in what was judged: 4 claims of rungs 2, 5-6, 8" in capsys.readouterr().out


def test_tokens_and_their_mask_are_read_off_a_batch_as_the_readme_says() -> None:
    """Each token after the first is a target where the mask says so at the position before."""
    (text,) = [block for block in BLOCKS if "is_target = " in block]
    batch = named_case("untied").batch
    found: dict[str, Any] = {"np": np, "batch": batch}
    exec(text, found)
    tokens, is_target = found["tokens"], found["is_target"]
    assert np.array_equal(tokens[:, :-1], batch.inputs_BT) and np.array_equal(tokens[:, 1:], batch.targets_BT)
    assert np.array_equal(is_target[:, 1:], batch.mask_BT) and not is_target[:, 0].any()
    assert torch.tensor(is_target).dtype == torch.bool
