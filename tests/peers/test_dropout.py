"""Dropout in training: LoRA equals PEFT with the same masks; DoRA is a published variant, not PEFT's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mlx_impl.config import LoRAConfig
from reference.lora import DoRALinear, LoRALinear
from tests.peers.cases import (
    ADAPTERS,
    LLAMA,
    PLAIN,
    Arrays,
    Oracle,
    random_batch,
    random_factors,
    random_weights,
)
from tests.peers.test_oracle import assert_promise, relative_errors
from tests.peers.twin import AllDouble, PeftTwin


def training_logits(lora: LoRAConfig) -> tuple[Arrays, Arrays]:
    """Logits of the reference and of PEFT, in float64, with the same random numbers in the same order."""
    given = LLAMA, random_weights(LLAMA), lora, random_factors(LLAMA, lora)
    tokens = torch.tensor(random_batch(LLAMA).inputs_BT, dtype=torch.long)
    oracle, twin = Oracle(*given).model.train(), PeftTwin(*given).model.train()
    with torch.no_grad(), AllDouble():
        torch.manual_seed(7)
        ours = oracle(tokens)
        torch.manual_seed(7)
        theirs = twin(tokens).logits
    return {"logits": ours.numpy()}, {"logits": theirs.numpy()}


def test_with_the_same_random_numbers_lora_with_dropout_equals_pefts_to_1e_12() -> None:
    """Dropout is on A's input, and what is kept is divided by 1 - p."""
    ours, theirs = training_logits(replace(PLAIN, dropout=0.3))
    assert_promise("dropout, LoRA", ours, theirs)
    without, _ = training_logits(PLAIN)
    assert not np.allclose(ours["logits"], without["logits"])


def pefts_forward(module: DoRALinear, x_BTI: torch.Tensor) -> torch.Tensor:
    """PEFT's formula: dropout also on the frozen weight's input, in the term scaled by m / |V| - 1."""
    length_O = LoRALinear.merged_weight(module).norm(dim=1).detach()
    dropped_BTI, gain_O = module.dropout(x_BTI), module.magnitude / length_O
    update_BTO = module.scale * (dropped_BTI @ module.lora_a) @ module.lora_b
    return module.linear(x_BTI) + (gain_O - 1) * (dropped_BTI @ module.linear.weight.T) + gain_O * update_BTO


def test_dora_with_dropout_is_the_variant_of_torchtune_and_mlx_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not PEFT's; with PEFT's formula the reference equals PEFT."""
    lora = replace(ADAPTERS["dora"], dropout=0.3)
    difference = max(relative_errors(*training_logits(lora)).values())
    print(f"DoRA, dropout 0.3: logits differ by {difference:.0%}")
    assert difference > 0.01
    monkeypatch.setattr(DoRALinear, "forward", pefts_forward)
    assert_promise("dropout, DoRA with PEFT's formula", *training_logits(lora))
