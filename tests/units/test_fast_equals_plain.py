"""The fast path equals the plain one: loss and every gradient, for every model, adapter and kind of batch.

Plain in float64 is what is expected. Fast in float64 is within 1e-12 of it; in float32 both paths are within
the derived bound, whose noise is that of plain on moved inputs (`tests/derived.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_impl.data import Batch, Example, make_batch, make_packed_batch
from mlx_impl.fast import head, query_chunks
from mlx_impl.fast.forward import to_arrays
from mlx_impl.fast.kept_positions import kept_positions
from mlx_impl.files.quantized import Quantization, quantize_modules
from mlx_impl.lora import lora_layers
from mlx_impl.model import CausalLM, position_ids
from tests.derived import (
    NUM_DRAWS,
    noise_of,
    require,
    require_same_names,
    within,
    within_bfloat16,
    within_exact,
)
from tests.lora_ladder.cases import (
    ARCHITECTURES,
    BIASED_DORA,
    SPEC,
    VARIANTS,
    Case,
    copies,
    make_factors,
    make_weights,
    named_case,
    one_prompt_batch,
    random_rows,
)
from tests.lora_ladder.protocol import Arrays
from tests.trainers.mlx_impl import MlxTrainer, PlainTrainer
from tests.units.test_bfloat16 import bfloat16_case, in_bfloat16

Trainer = type[MlxTrainer]
Act = Callable[[Trainer, Case], Arrays]
DROPOUT = 0.25
DIVISIBLE = replace(SPEC, hidden_size=32, intermediate_size=64, num_attention_heads=4, head_dim=8)


def packed_rows(vocab_size: int) -> Batch:
    """The same tokens in both rows: two examples in the first, and in the second these as one."""
    one, other = random_rows(vocab_size, (9, 7))
    rows = (one, other, one[:-1] + other)
    examples = [Example(tuple(row), (False,) * 2 + (True,) * (len(row) - 2)) for row in rows]
    return make_packed_batch(examples, [(0, 1), (2,)])


def without_first_targets(batch: Batch) -> Batch:
    return batch._replace(mask_BT=batch.mask_BT & (np.arange(len(batch.mask_BT)) > 0)[:, None])


BATCHES: dict[str, Callable[[Case], Batch]] = {
    "unequal lengths": lambda case: case.batch,
    "a row without a target": lambda case: without_first_targets(case.batch),
    "a shared prefix": lambda case: one_prompt_batch(case.spec.vocab_size),
    "packed rows": lambda case: packed_rows(case.spec.vocab_size),
}
every_batch = pytest.mark.parametrize("batch_name", BATCHES)


def rows_of_targets(*token_counts: int, is_alike: bool = False) -> Callable[[Case], Batch]:
    """A target at every position of rows of so many tokens; alike: of one row, several times."""

    def made(case: Case) -> Batch:
        rows = random_rows(case.spec.vocab_size, token_counts)
        rows = [rows[0]] * len(rows) if is_alike else rows
        return make_batch([Example(tuple(row), (False,) + (True,) * (len(row) - 1)) for row in rows])

    return made


every_position_a_target = rows_of_targets(9, 9)
ALL_TARGETS = {
    "72 targets, padded to 80": rows_of_targets(25, 25, 25),
    "positions that are shared": rows_of_targets(9, 9, 9, 9, is_alike=True),
}
every_case = pytest.mark.parametrize("name", [*ARCHITECTURES, *list(VARIANTS)[1:], BIASED_DORA])
LINEAR_AND_DORA = pytest.mark.parametrize("name", ["untied", "dora"])


def build(kind: Trainer, case: Case) -> MlxTrainer:
    return kind(case.spec, copies(case.weights), case.lora, copies(case.factors))


def answers(built: MlxTrainer, batch: Batch) -> Arrays:
    """In training: the sum of nats, the number of targets, and every gradient."""
    model, path = built.model.train(), built.path
    (nats, num_targets), grads = nn.value_and_grad(model, path.batch_loss)(model, path.to_arrays(batch))
    named = {"nats": nats, "targets": num_targets, **dict(tree_flatten(grads))}
    return {n: np.array(a.astype(mx.float32) if a.dtype == mx.bfloat16 else a) for n, a in named.items()}


def one_step(kind: Trainer, case: Case, batch_name: str, checkpointed: bool = False) -> Arrays:
    built, batch = build(kind, case), BATCHES[batch_name](case)
    assert kept_positions(batch) or batch.mask_BT.all(), "every position would be computed"
    built.model.model.grad_checkpoint = checkpointed
    if case.lora.dropout:
        built.set_dropout_masks(masks_of(built.model, batch))
    return answers(built, batch)


def masks_of(model: CausalLM, batch: Batch) -> Arrays:
    """The same in every example: the fast path has one mask at a shared position."""
    rng, (B, T) = np.random.default_rng(4), batch.inputs_BT.shape
    masks = {name: rng.random((T, a.lora_a.shape[0])) >= DROPOUT for name, a in lora_layers(model).items()}
    alone_BT = mx.zeros((B, T), mx.int32)
    position_BT = np.array(position_ids(alone_BT if batch.segment_BT is None else mx.array(batch.segment_BT)))
    return {name: keep_TI[position_BT] for name, keep_TI in masks.items()}


def in_float64(kind: Trainer, case: Case, act: Act) -> Arrays:
    with MlxTrainer.exact(), PlainTrainer.exact():
        return act(kind, case)


def require_exact(case: Case, act: Act) -> None:
    """In float64 throughout."""
    fast, plain = (in_float64(kind, case.in_double(), act) for kind in (MlxTrainer, PlainTrainer))
    require_same_names("fast", fast, plain)
    require("fast", [within_exact(name, fast[name], plain[name]) for name in plain])


def require_within_rounding(case: Case, act: Act, in_float32: Act | None = None) -> None:
    """Both paths in float32."""
    exact = in_float64(PlainTrainer, case, act)
    moved = (case.moved(seed) for seed in range(NUM_DRAWS))
    noise = noise_of((in_float64(PlainTrainer, other, act) for other in moved), exact)
    for kind in (MlxTrainer, PlainTrainer):
        ours = (in_float32 or act)(kind, case)
        require_same_names(kind.__name__, ours, exact)
        verdicts = [within(n, ours[n], exact[n], noise[n], case.longest_sum) for n in exact]
        worst = require(kind.__name__, verdicts)
        print(f"{kind.__name__}: {worst.name} used {worst.used:.0%} of its tolerance")


@every_batch
@every_case
def test_in_float64_loss_and_gradients_are_equal_to_1e_12(name: str, batch_name: str) -> None:
    require_exact(named_case(name), partial(one_step, batch_name=batch_name))


@LINEAR_AND_DORA
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
def test_where_every_position_has_a_target_none_is_selected(
    name: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX compiles kernels of gathers and scatters, for seconds each."""
    case = named_case(name)
    monkeypatch.setitem(BATCHES, "all", every_position_a_target)
    assert to_arrays(every_position_a_target(case))[1] is None
    require_exact(case, partial(one_step, batch_name="all", checkpointed=checkpointed))


@pytest.mark.parametrize("what", ALL_TARGETS)
def test_where_every_position_has_a_target_some_are_selected_all_the_same(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head reads padding too, or what is computed is not every position."""
    case = named_case("untied")
    monkeypatch.setitem(BATCHES, what, ALL_TARGETS[what])
    require_exact(case, partial(one_step, batch_name=what))
    batch = ALL_TARGETS[what](case)
    assert batch.mask_BT.all() and to_arrays(batch)[1] is not None


@every_case
def test_in_float32_loss_and_gradients_are_equal_within_rounding(name: str) -> None:
    require_within_rounding(named_case(name), partial(one_step, batch_name="a shared prefix"))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dropout", [0.0, DROPOUT], ids=["no dropout", "dropout"])
@every_batch
@LINEAR_AND_DORA
def test_with_the_same_dropout_masks_and_checkpointing_too(
    name: str, batch_name: str, dropout: float, checkpointed: bool
) -> None:
    case = named_case(name).with_dropout(dropout)
    require_exact(case, partial(one_step, batch_name=batch_name, checkpointed=checkpointed))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", ["untied", "qk norm"])
def test_with_attention_in_blocks_of_queries_too(
    name: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_chunks, "MAX_SCORES", 60)
    for batch_name in BATCHES:
        require_exact(named_case(name), partial(one_step, batch_name=batch_name, checkpointed=checkpointed))


def test_with_a_real_vocabulary_in_chunks_of_four_targets_too(monkeypatch: pytest.MonkeyPatch) -> None:
    case = named_case("real vocabulary")
    monkeypatch.setattr(head, "CHUNK_LOGITS", 4 * case.spec.vocab_size)
    require_exact(case, partial(one_step, batch_name="a shared prefix"))


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("bits", [4, 8])
def test_with_quantized_weights_too(bits: int, variant: str) -> None:
    """Plain in float64 has the dequantized weights."""
    lora, weights = VARIANTS[variant], make_weights(DIVISIBLE)
    stored = {n: mx.quantize(mx.array(w), 32, bits) for n, w in weights.items() if w.ndim == 2}
    weights |= {n: np.array(mx.dequantize(*parts, 32, bits)) for n, parts in stored.items()}
    case = Case("quantized", DIVISIBLE, lora, weights, make_factors(DIVISIBLE, lora, weights))

    def quantized(kind: Trainer, case: Case) -> Arrays:
        model = (built := build(kind, case)).model
        adapted = lora_layers(model)
        for name, parts in stored.items():
            linear = name.removesuffix(".weight")
            module = f"{linear}.linear" if linear in adapted else linear
            quantize_modules(model, {module: Quantization(32, bits)})
            named = zip(("weight", "scales", "biases"), parts, strict=True)
            model.load_weights([(f"{module}.{part}", array) for part, array in named], strict=False)
        return answers(built, BATCHES["a shared prefix"](case))

    require_within_rounding(case, partial(one_step, batch_name="a shared prefix"), quantized)


@every_batch
@pytest.mark.parametrize("name", ["untied", "sliding window", "dora"])
def test_in_bfloat16_loss_and_gradients_are_equal_within_its_rounding(name: str, batch_name: str) -> None:
    case = bfloat16_case(name)
    exact = in_float64(PlainTrainer, case, partial(one_step, batch_name=batch_name))
    fast = build(MlxTrainer, case)
    fast.model = in_bfloat16(case)
    ours = answers(fast, BATCHES[batch_name](case))
    require(name, [within_bfloat16(n, ours[n], exact[n], case.longest_sum) for n in exact])
