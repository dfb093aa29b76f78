"""Rung 17, files: what is saved is what is loaded, by name and scale, in PEFT's words.

The ladder reads and writes the files itself (`peft_files.py`), so that a mistake that saving and loading
share does not cancel. No file holds a scale: a reader computes it by PEFT's rules from rank, alpha, patterns
and rsLoRA. PEFT only warns where a tensor is missing or unknown, and a part of an adapter is another adapter.
PEFT stores A as (R, I) and B as (O, R).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlx_impl.config import LoRAConfig, TrainConfig
from tests.derived import Divergence
from tests.lora_ladder.cases import SPEC, Case, make_factors, make_weights
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.peft_files import (
    CONFIG,
    TENSORS,
    is_target,
    linears_of,
    of_file,
    rank_and_scale,
    read_record,
    read_safetensors,
    record_of,
    to_file,
    write_adapter,
)
from tests.lora_ladder.protocol import Arrays

BASIC = LoRAConfig(rank=3, alpha=7.5, dropout=0.25)
LAST_LAYERS = replace(
    BASIC, num_layers=11, target_modules=("v_proj",), alpha_pattern={r"1\.self_attn\.\w+": 2.5}
)
# The first pattern that matches decides, and in alphabetical order another one would be the first.
ORDERED = {"v_proj": 3.5, r"1\.self_attn\.v_proj": 5.25, "mlp.down_proj": 4.5}
TRAINING = TrainConfig(iters=2, learning_rate=0.01)

ADAPTERS = {
    "lora": BASIC,
    "rslora": replace(BASIC, use_rslora=True),
    "dora": replace(BASIC, use_dora=True),
    "patterns": replace(BASIC, rank_pattern={"q_proj": 2, r"1\.mlp\.\w+": 5}, alpha_pattern=ORDERED),
    "ranks alone": replace(BASIC, rank_pattern={r"0\.self_attn\.[kv]_proj": 7}),
    "patterns of rslora and dora": replace(
        BASIC, use_rslora=True, use_dora=True, rank_pattern={"mlp.up_proj": 2}, alpha_pattern=ORDERED
    ),
    "some": replace(BASIC, target_modules=("q_proj", "mlp.down_proj")),
    "expression": replace(BASIC, target_modules=r".*\.0\.self_attn\.[kv]_proj"),
    "all-linear": replace(BASIC, target_modules="all-linear"),
    "last layer": replace(BASIC, num_layers=1),
    "expression in the last layer": replace(BASIC, target_modules=r".*\.[kv]_proj", num_layers=1),
    "last of twelve layers": LAST_LAYERS,
    "biased dora": replace(BASIC, use_dora=True),
}
SPECS = {
    "last of twelve layers": replace(SPEC, num_hidden_layers=12),
    "biased dora": replace(SPEC, qkv_bias=True),
    "all-linear": replace(SPEC, tie_word_embeddings=True),
}
saves, loads = pytest.mark.needs("save_adapter"), pytest.mark.needs("load_adapter")
each_adapter = pytest.mark.parametrize("name", ADAPTERS)


def adapted(name: str) -> Case:
    spec, lora = SPECS.get(name, SPEC), ADAPTERS[name]
    weights = make_weights(spec)
    return Case(name, spec, lora, weights, make_factors(spec, lora, weights))


def adapted_linears(factors: Arrays) -> set[str]:
    return {name.rpartition(".")[0] for name in factors}


def loaded(case: Case, candidate: Any, folder: Path) -> Any:
    """A trainer of the bare model, with the adapter of these files."""
    trainer = case.bare().build(candidate)
    trainer.load_adapter(folder)
    return trainer


def logits(trainer: Any, case: Case) -> Arrays:
    return {"logits": trainer.logits(case.batch.inputs_BT)}


def written(case: Case, folder: Path, dtype: str = "F32") -> Path:
    """The case's adapter as PEFT writes it."""
    write_adapter(folder, record_of(case.lora, adapted_linears(case.factors)), case.factors, dtype)
    return folder


def require_tensors(judge: Judge, folder: Path, factors: Arrays) -> None:
    """Under PEFT's names, in PEFT's shapes, in float32, to the bit, and nothing else."""
    __tracebackhide__ = True
    tensors, types = read_safetensors(folder / TENSORS)
    judge.same_bits(tensors, {n: array.astype(np.float32) for n, array in to_file(factors).items()})
    others = [name for name, dtype in types.items() if dtype != "F32"]
    if others:
        judge.report(lambda: refuse(f"{others[0]} must be of type F32 in the file, got {types[others[0]]}"))


def refuse(what: str) -> None:
    raise Divergence(what)


@saves
@each_adapter
def test_the_file_has_the_factors_under_pefts_names(
    candidate: Any, judge: Judge, name: str, tmp_path: Path
) -> None:
    """Each transposed, in float32, to the bit; nothing of the base is there; saving changes nothing."""
    case = adapted(name)
    trainer = case.build(candidate)
    trainer.save_adapter(tmp_path)
    require_tensors(judge, tmp_path, case.factors)
    judge.same_bits({**trainer.factors(), **trainer.base()}, {**case.factors, **case.weights})


@saves
@each_adapter
def test_pefts_rules_give_every_linear_its_rank_and_scale(
    candidate: Any, judge: Judge, name: str, tmp_path: Path
) -> None:
    """What `adapter_config.json` says is what the reference multiplies A B by, in these linears alone."""
    case = adapted(name)
    case.build(candidate).save_adapter(tmp_path)
    record = read_record(tmp_path)
    targets = [linear for linear in linears_of(case.weights) if is_target(linear, record)]
    ours = {linear: np.array(rank_and_scale(linear, record)) for linear in targets}
    linears = case.build(judge.oracle(torch.float64)).adapted()
    expected = {n: np.array([linear.lora_a.shape[1], linear.scale]) for n, linear in linears.items()}
    judge.require_names(ours, expected)
    judge.hold([judge.rounded(f"rank and scale of {n}", ours[n], expected[n], 1) for n in expected])
    judge.same_bits({"lora_dropout": np.array(record["lora_dropout"])}, {"lora_dropout": np.array(0.25)})


@saves
@each_adapter
def test_the_reference_with_what_the_files_say_has_the_logits(
    candidate: Any, judge: Judge, name: str, tmp_path: Path
) -> None:
    """A reader who knows the files and PEFT's rules alone."""
    case = adapted(name)
    trainer = case.build(candidate)
    trainer.save_adapter(tmp_path)
    read = as_read(case, tmp_path, candidate.dialect.scale)
    judge.given(logits(trainer, case), read, lambda reader: logits(reader, case))


def as_read(case: Case, folder: Path, scale: str) -> Case:
    """The case that the files describe: each linear by its name, with the rank and scale of PEFT's rules."""
    record = read_record(folder)
    targets = [linear for linear in linears_of(case.weights) if is_target(linear, record)]
    rules = {re.escape(linear): rank_and_scale(linear, record) for linear in targets}
    lora = LoRAConfig(
        target_modules=tuple(targets),
        use_dora=bool(record.get("use_dora")),
        rank_pattern={linear: rank for linear, (rank, _) in rules.items()},
        alpha_pattern={linear: s if scale == "alpha" else s * rank for linear, (rank, s) in rules.items()},
    )
    factors = of_file(read_safetensors(folder / TENSORS)[0])
    return replace(case, lora=lora, factors=factors)


@loads
@pytest.mark.canonical("scale")
@each_adapter
def test_a_file_of_pefts_has_the_logits_of_its_factors(
    candidate: Any, judge: Judge, name: str, tmp_path: Path
) -> None:
    """To the bit, as in a trainer that was given the factors; the base is untouched."""
    case = adapted(name)
    trainer = loaded(case, candidate, written(case, tmp_path))
    judge.same_bits({**trainer.factors(), **trainer.base()}, {**case.factors, **case.weights})
    judge.same_bits(logits(trainer, case), logits(case.build(candidate), case))


@loads
@pytest.mark.canonical("scale")
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_a_file_in_half_precision_is_read_as_float32(
    candidate: Any, judge: Judge, dtype: str, tmp_path: Path
) -> None:
    """The factors are exactly the file's numbers."""
    case = adapted("lora")
    trainer = loaded(case, candidate, written(case, tmp_path, dtype))
    halved = of_file(read_safetensors(tmp_path / TENSORS)[0])
    halved = {name: halved[name].astype(np.float32) for name in case.factors}
    judge.same_bits(trainer.factors(), halved)
    judge.same_bits(logits(trainer, case), logits(replace(case, factors=halved).build(candidate), case))


@loads
@pytest.mark.canonical("scale")
@pytest.mark.parametrize("name", ["lora", "patterns of rslora and dora", "last layer"])
def test_a_loaded_adapter_trains_on_as_one_that_was_given(
    candidate: Any, judge: Judge, name: str, tmp_path: Path
) -> None:
    """Two updates with the file's dropout: the same losses and factors, to the bit; the base stays."""
    case = adapted(name)
    trainers = case.build(candidate), loaded(case, candidate, written(case, tmp_path))
    given, ours = (
        {"losses": np.array(trainer.train([[case.batch]] * 2, TRAINING)), **trainer.factors()}
        for trainer in trainers
    )
    judge.same_bits(ours, given)
    judge.same_bits(trainers[1].base(), case.weights)


@loads
@pytest.mark.canonical("scale")
def test_an_adapter_loaded_into_a_model_in_evaluation_drops_nothing(
    candidate: Any, judge: Judge, tmp_path: Path
) -> None:
    """The model had a loss computed before; trained, it then drops what an adapter that was given drops."""
    case = adapted("lora")
    given, trainer = case.build(candidate), case.bare().build(candidate)
    trainer.loss(case.batch)
    trainer.load_adapter(written(case, tmp_path))
    for _ in range(2):
        judge.same_bits(evaluated(trainer, case), evaluated(given, case))
        losses = [np.array(either.train([[case.batch]], TRAINING)) for either in (trainer, given)]
        judge.same_bits({"losses": losses[0]}, {"losses": losses[1]})


def evaluated(trainer: Any, case: Case) -> Arrays:
    return {"nats": np.array(trainer.loss(case.batch)[0]), **logits(trainer, case)}


@saves
@loads
@each_adapter
def test_what_is_saved_loaded_and_saved_again_is_the_same(
    candidate: Any, judge: Judge, name: str, tmp_path: Path
) -> None:
    """Tensors, rank and scale of every linear, and dropout; and the logits, to the bit."""
    case, first, second = adapted(name), tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    trainer = case.build(candidate)
    trainer.save_adapter(first)
    again = loaded(case, candidate, first)
    again.save_adapter(second)
    require_tensors(judge, second, case.factors)
    judge.same_bits(said(case, second), said(case, first))
    judge.same_bits(logits(again, case), logits(trainer, case))


@saves
@loads
def test_a_second_adapter_in_a_folder_replaces_the_first(
    candidate: Any, judge: Judge, tmp_path: Path
) -> None:
    """Its tensors and its record: another rank, other scales, and DoRA."""
    adapted("patterns").build(candidate).save_adapter(tmp_path)
    case = adapted("dora")
    trainer = case.build(candidate)
    trainer.save_adapter(tmp_path)
    require_tensors(judge, tmp_path, case.factors)
    judge.same_bits(logits(loaded(case, candidate, tmp_path), case), logits(trainer, case))


def said(case: Case, folder: Path) -> Arrays:
    record = read_record(folder)
    linears = [linear for linear in linears_of(case.weights) if is_target(linear, record)]
    rules = {linear: np.array(rank_and_scale(linear, record)) for linear in linears}
    return rules | {"lora_dropout": np.array(record.get("lora_dropout", 0.0))}


@saves
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_a_trained_adapter_is_the_one_that_is_saved(
    candidate: Any, judge: Judge, name: str, tmp_path: Path
) -> None:
    """Also over the files of the adapter as it was before an update."""
    case = adapted(name)
    trainer = case.build(candidate)
    for _ in range(2):
        trainer.save_adapter(tmp_path)
        require_tensors(judge, tmp_path, trainer.factors())
        trainer.train([[case.batch]], TRAINING)
    trainer.save_adapter(tmp_path)
    require_tensors(judge, tmp_path, trainer.factors())


def without_a_b(record: dict[str, Any], factors: Arrays) -> None:
    del factors["model.layers.1.mlp.up_proj.lora_b"]


def without_a_magnitude(record: dict[str, Any], factors: Arrays) -> None:
    del factors["model.layers.0.self_attn.v_proj.magnitude"]


def under_another_name(record: dict[str, Any], factors: Arrays) -> None:
    factors["layers.0.self_attn.k_proj.lora_a"] = factors.pop("model.layers.0.self_attn.k_proj.lora_a")


def of_another_rank(record: dict[str, Any], factors: Arrays) -> None:
    record["r"] += 1


def of_more_linears(record: dict[str, Any], factors: Arrays) -> None:
    record["target_modules"] = ["q_proj"]


UNFIT = [without_a_b, without_a_magnitude, under_another_name, of_another_rank, of_more_linears]


@loads
@pytest.mark.canonical("scale")
@pytest.mark.parametrize("change", UNFIT, ids=[change.__name__ for change in UNFIT])
def test_files_that_do_not_fit_are_refused(
    candidate: Any, judge: Judge, change: Callable[[dict[str, Any], Arrays], None], tmp_path: Path
) -> None:
    """By an error of any kind: an adapter that is loaded in part answers as another one."""
    case = adapted("dora")
    record, factors = record_of(case.lora, adapted_linears(case.factors)), dict(case.factors)
    change(record, factors)
    write_adapter(tmp_path, record, factors)
    trainer = case.bare().build(candidate)
    try:
        trainer.load_adapter(tmp_path)
    except NotImplementedError:
        raise
    except Exception:
        return
    what = change.__name__.replace("_", " ")
    judge.report(lambda: refuse(f"load_adapter() must refuse files {what} ({CONFIG} and {TENSORS})"))
