"""Rung 17, files: an adapter in mlx-lm's files is the same function as in PEFT's.

The ladder reads and writes the files itself (`mlx_lm_files.py`). mlx-lm's `scale` is the factor on A B, where
PEFT has alpha / rank. Taken for alpha, it is wrong by the rank. There is one scale for all linears, so an
adapter with several of them must be saved with other factors, whose products are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_impl.config import LoRAConfig
from tests.lora_ladder.cases import SPEC, Case, make_factors, make_weights, scale_of
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.mlx_lm_files import (
    TENSORS,
    adapted_linears,
    config_of,
    read_adapter,
    record_of,
    write_adapter,
)
from tests.lora_ladder.peft_files import linears_of, read_safetensors
from tests.lora_ladder.test_17_files import refuse


@dataclass(frozen=True)
class Given:
    """What mlx-lm has in its configuration, and how deep the model is."""

    rank: int
    scale: float
    num_layers: int = -1
    keys: tuple[str, ...] | None = None
    is_dora: bool = False
    depth: int = SPEC.num_hidden_layers

    @property
    def record(self) -> dict[str, Any]:
        return record_of(self.rank, self.scale, 0.25, self.num_layers, self.keys, self.is_dora)


GIVEN = {
    "mlx-lm's defaults": Given(rank=8, scale=20.0, num_layers=16),  # more layers than there are
    "scale below 1": Given(rank=4, scale=0.375),
    "some linears": Given(rank=2, scale=2.5, keys=("self_attn.q_proj", "mlp.down_proj")),
    "last layer": Given(rank=3, scale=4.0, num_layers=1, keys=("self_attn.v_proj", "mlp.up_proj")),
    "last of twelve layers": Given(rank=2, scale=5.0, num_layers=11, keys=("self_attn.v_proj",), depth=12),
    "whole names": Given(
        rank=3, scale=2.0, num_layers=1, keys=("model.layers.0.mlp.up_proj", "self_attn.q_proj")
    ),
    "dora": Given(rank=3, scale=2.5, is_dora=True),
}
BASIC = LoRAConfig(rank=3, alpha=7.5, dropout=0.25)
TO_SAVE = {
    "lora": BASIC,
    "rslora": replace(BASIC, use_rslora=True),
    "dora": replace(BASIC, use_dora=True),
    "last layer": replace(BASIC, num_layers=1),
    "some linears": replace(BASIC, target_modules=("k_proj", "0.mlp.up_proj")),
    "ranks": replace(BASIC, rank_pattern={"q_proj": 2, r"1\.mlp\.\w+": 5}),
    "alphas": replace(BASIC, alpha_pattern={"v_proj": 3.5, "mlp.down_proj": 30.0}),
}


def given_case(given: Given) -> Case:
    spec = replace(SPEC, num_hidden_layers=given.depth)
    weights = make_weights(spec)
    lora = config_of(given.record, linears_in_blocks(weights), given.depth)
    return Case("in mlx-lm's files", spec, lora, weights, make_factors(spec, lora, weights))


def linears_in_blocks(weights: Any) -> list[str]:
    return [name for name in linears_of(weights) if "layers" in name]


@pytest.mark.needs("load_mlx_lm")
@pytest.mark.canonical("scale")
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_a_file_of_mlx_lms_has_the_logits_of_its_factors(
    candidate: Any, judge: Judge, given: Given, tmp_path: Path
) -> None:
    """To the bit, as in a trainer that was given the factors and alpha = scale * rank; the base stays."""
    case = given_case(given)
    write_adapter(tmp_path, given.record, case.factors)
    trainer, tokens_BT = case.bare().build(candidate), case.batch.inputs_BT
    trainer.load_mlx_lm(tmp_path)
    judge.same_bits({**trainer.factors(), **trainer.base()}, {**case.factors, **case.weights})
    judge.same_bits(
        {"logits": trainer.logits(tokens_BT)}, {"logits": case.build(candidate).logits(tokens_BT)}
    )


@pytest.mark.needs("save_mlx_lm")
@pytest.mark.parametrize("name", TO_SAVE)
def test_what_mlx_lm_reads_is_the_product_of_the_factors(
    candidate: Any, judge: Judge, name: str, tmp_path: Path
) -> None:
    """Of each linear scale * A B, in float32, and with DoRA the magnitude; saving changes nothing."""
    lora, weights = TO_SAVE[name], make_weights(SPEC)
    case = Case(name, SPEC, lora, weights, make_factors(SPEC, lora, weights))
    trainer = case.build(candidate)
    trainer.save_mlx_lm(tmp_path)
    judge.same_bits({**trainer.factors(), **trainer.base()}, {**case.factors, **case.weights})
    record, factors = judge.report(lambda: read_adapter(tmp_path))
    others = set(read_safetensors(tmp_path / TENSORS)[1].values()) - {"F32"}
    judge.claim(not others, f"tensors must be of type F32 in the file, got {', '.join(sorted(others))}")
    judge.require_names(factors, case.factors)
    linears = {name.rpartition(".")[0] for name in case.factors}
    named = adapted_linears(record, linears_in_blocks(weights), SPEC.num_hidden_layers)
    judge.require_names(dict.fromkeys(named, np.array(0)), dict.fromkeys(linears, np.array(0)))
    settings = record["lora_parameters"]
    products = []
    for linear in linears:
        a_IR, b_RO = (factors[f"{linear}.{factor}"].astype(np.float64) for factor in ("lora_a", "lora_b"))
        if a_IR.shape[1] != settings["rank"]:
            judge.report(lambda: refuse(f"{linear} must have the rank in the record"))  # noqa: B023
        ours_IO = settings["scale"] * a_IR @ b_RO
        a_IR, b_RO = (case.factors[f"{linear}.{f}"].astype(np.float64) for f in ("lora_a", "lora_b"))
        expected_IO = scale_of(linear, lora, a_IR.shape[1], candidate.dialect) * a_IR @ b_RO
        products.append(judge.rounded(f"scale * A B of {linear}", ours_IO, expected_IO, a_IR.shape[1]))
    judge.hold(products)
    same = {"dropout": np.array(settings["dropout"])} | {n: factors[n] for n in factors if "magnitude" in n}
    judge.same_bits(
        same, {"dropout": np.array(lora.dropout)} | {n: case.factors[n] for n in same if n in factors}
    )


@pytest.mark.needs("save_mlx_lm", "load_mlx_lm")
@pytest.mark.parametrize("name", ["lora", "dora", "last layer"])
def test_what_is_saved_for_mlx_lm_is_what_is_loaded(
    candidate: Any, judge: Judge, name: str, tmp_path: Path
) -> None:
    """Factors and logits, to the bit."""
    lora, weights = TO_SAVE[name], make_weights(SPEC)
    case = Case(name, SPEC, lora, weights, make_factors(SPEC, lora, weights))
    trainer, again = case.build(candidate), case.bare().build(candidate)
    trainer.save_mlx_lm(tmp_path)
    again.load_mlx_lm(tmp_path)
    tokens_BT = case.batch.inputs_BT
    ours, expected = ({"logits": t.logits(tokens_BT), **t.factors()} for t in (again, trainer))
    judge.same_bits(ours, expected)
