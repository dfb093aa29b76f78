"""Packed examples as rows of attention of their own: loss and gradients as before, memory linear in T."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_impl.config import LoRAConfig
from mlx_impl.data import Batch, Example, make_packed_batch
from mlx_impl.fast import segments
from mlx_impl.fast.forward import FAST
from mlx_impl.fast.kept_positions import kept_in_groups
from mlx_impl.fast.segments import Group, examples_apart, groups_of
from mlx_impl.lora import add_lora
from mlx_impl.model import CausalLM
from mlx_impl.train import PLAIN
from tests.derived import compare, require
from tests.lora_ladder.cases import SPEC
from tests.units.peak import most_of_a_gradient
from tests.units.test_unpadding import example, hold_to_the_plain_path, model_of, results

pytestmark = pytest.mark.usefixtures("on_the_cpu")

LENGTHS = [40, 3, 17, 9, 16, 25, 8, 31, 2, 12]
ROWS = [(0,), (1, 2, 3), (4, 5), (6, 7), (8, 9)]
PACKED = make_packed_batch([example(n, max(1, n // 3)) for n in LENGTHS], ROWS)


def tokens_of(inputs_BT: np.ndarray, groups: Sequence[Group]) -> list[tuple[int, ...]]:
    """Of each row, without its padding."""
    flat, rows = inputs_BT.reshape(-1), []
    for group in groups:
        part, flat = np.split(flat, [group.rows * group.width])
        rows += [tuple(row[row > 0].tolist()) for row in part.reshape(group)]
    assert not len(flat)
    return rows


def test_each_example_is_a_row_of_its_own() -> None:
    apart, groups = examples_apart(PACKED)
    rows = tokens_of(apart.inputs_BT, groups)
    examples = [example(n, max(1, n // 3)) for n in LENGTHS]
    assert sorted(filter(None, rows)) == sorted(e.tokens[:-1] for e in examples)
    assert apart.mask_BT.sum() == PACKED.mask_BT.sum() and apart.segment_BT is None


def test_what_has_no_target_has_no_row() -> None:
    packed = make_packed_batch([example(20, 3), example(9, 0), example(5, 1)], [(0, 1, 2)])
    apart, groups = examples_apart(packed)
    assert [len(row) for row in tokens_of(apart.inputs_BT, groups) if row] == [20, 5]


def test_a_batch_without_targets_is_one_row() -> None:
    apart, groups = examples_apart(make_packed_batch([example(9, 0), example(5, 0)], [(0, 1)]))
    assert groups == [(1, 16)] and not apart.mask_BT.any()


@pytest.mark.parametrize(
    ("lengths", "positions", "groups"),
    [
        ([1024] * 8, 8192, [(8, 1024)]),
        ([1000] * 7, 8192, [(8, 1024)]),
        ([1640] * 5, 8192, [(4, 2048), (1, 2048)]),
        ([8192], 8192, [(1, 8192)]),
        ([4100] + [60] * 60, 8192, [(1, 8192), (64, 64)]),
        ([120] * 9 + [40] * 3, 2048, [(16, 128)]),
        ([120] * 7 + [40] * 13, 2048, [(16, 128), (4, 64)]),
    ],
)
def test_rows_of_similar_length_are_a_group(
    lengths: list[int], positions: int, groups: list[tuple[int, int]]
) -> None:
    assert groups_of(lengths, positions, 8192) == groups


def test_no_row_is_wider_than_the_packed_ones() -> None:
    assert groups_of([33], 80, 40) == [(1, 40)]


def drawn(seed: int) -> tuple[list[int], int, int]:
    random = np.random.default_rng(seed)
    width = int(random.choice([256, 1024, 8192]))
    lengths = sorted(np.clip(np.exp(random.normal(5, 1.3, 200)).astype(int), 1, width).tolist(), reverse=True)
    return lengths, sum(lengths), width


@pytest.mark.parametrize("seed", range(20))
def test_every_example_fits_and_padding_is_bounded(seed: int) -> None:
    """By a factor of two for the powers of two, and MAX_FILLED for each group."""
    lengths, positions, width = drawn(seed)
    groups = groups_of(lengths, positions, width)
    widths = [group.width for group in groups for _ in range(group.rows)]
    assert len(widths) >= len(lengths) and all(n <= w for n, w in zip(lengths, widths, strict=False))
    rounded = sum(max(8, 2 * n) for n in lengths)
    assert sum(widths) <= rounded + len(groups) * segments.MAX_FILLED * positions
    assert len(groups) <= 8


SHARES = {"many groups": 0.0, "as shipped": segments.MAX_FILLED, "one group": 10.0}
FILLED = pytest.mark.parametrize("filled", SHARES.values(), ids=SHARES)


@FILLED
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 6}, {"qk_norm": True}], ids=str)
def test_loss_and_gradients_are_those_of_the_mask(
    changes: dict[str, Any], filled: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 to 1e-12."""
    monkeypatch.setattr(segments, "MAX_FILLED", filled)
    hold_to_the_plain_path(model_of(**changes), PACKED)


@FILLED
def test_compiled_and_checkpointed_too(filled: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MAX_FILLED", filled)
    model = model_of()
    hold_to_the_plain_path(model, PACKED, compiled=True)
    model.model.grad_checkpoint = True
    hold_to_the_plain_path(model, PACKED)


def test_as_shipped_these_rows_are_several_groups() -> None:
    assert len(examples_apart(PACKED)[1]) > 1


def test_what_follows_the_last_target_of_a_row_is_not_computed() -> None:
    """Of each example, not of its group: of 320 positions the 163 tokens and a dummy, in a bucket of 176."""
    apart, groups = examples_apart(PACKED)
    kept = kept_in_groups(apart, groups)
    assert apart.inputs_BT.size == 4 * 48 + 8 * 16 and sum(LENGTHS) == 163
    assert kept.is_needed_U.sum() == 163 and len(kept.kept_U) == 176


def test_full_groups_need_no_dummy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place of both groups holds a token that a target depends on."""
    monkeypatch.setattr(segments, "MAX_FILLED", 0.0)
    packed = make_packed_batch([example(64, 3), *[example(8, 3)] * 8], [(0,), tuple(range(1, 9))])
    apart, groups = examples_apart(packed)
    kept = kept_in_groups(apart, groups)
    assert groups == [(1, 64), (8, 8)] and kept.is_needed_U.all() and len(kept.kept_U) == 128
    hold_to_the_plain_path(model_of(), packed)


def test_a_compiled_step_takes_batches_of_one_shape_and_other_segments() -> None:
    """The groups are a part of what a compiled step is traced for."""
    one, two = (
        make_packed_batch([example(n, 2) for n in lengths], [tuple(range(len(lengths)))])
        for lengths in ((30, 30, 4), (58, 2, 4))
    )
    assert one.inputs_BT.shape == two.inputs_BT.shape
    model = model_of()
    state = [model.state, mx.random.state]
    run = mx.compile(
        nn.value_and_grad(model, lambda arrays: FAST.batch_loss(model, arrays)), inputs=state, outputs=state
    )
    for batch in (one, two, one):
        (nats, _), _ = run(FAST.to_arrays(batch))
        plain = results(model, batch, PLAIN)["nats"]
        require("nats", [compare("nats", np.array(nats, np.float32), plain.astype(np.float32), plain, 64)])


def test_examples_of_several_packed_rows_share_a_prefix() -> None:
    packed = make_packed_batch([example(n, 2, num_shared=9) for n in (30, 28, 25, 31)], [(0, 1), (2, 3)])
    kept = FAST.to_arrays(packed)[-1]
    assert len(kept) == 5 and int(kept[-1].sum()) == 9
    hold_to_the_plain_path(model_of(), packed)


def peak_of_a_gradient(batch: Batch) -> int:
    net = CausalLM(replace(SPEC, num_hidden_layers=1))
    add_lora(net, LoRAConfig(rank=2))
    mx.eval(net.parameters())
    return most_of_a_gradient(net, batch)


def one_row(lengths: Sequence[int]) -> Batch:
    examples = [Example((1,) * (n + 1), (False,) * n + (True,)) for n in lengths]
    return make_packed_batch(examples, [tuple(range(len(lengths)))])


def test_twice_the_packed_tokens_take_twice_the_memory() -> None:
    """Examples of 64 tokens; alone in its row an example takes four times as much."""
    packed = [peak_of_a_gradient(one_row([64] * (tokens // 64))) for tokens in (512, 1024)]
    alone = [peak_of_a_gradient(one_row([tokens])) for tokens in (512, 1024)]
    print(f"packed {packed}, alone {alone} bytes")
    assert packed[1] < 2.3 * packed[0]
    assert alone[1] > 3.5 * alone[0] and alone[1] > 4 * packed[1]
