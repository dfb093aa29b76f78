"""Packed examples as rows of attention of their own: loss and gradients as before, memory linear in T."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_impl.config import LoRAConfig
from mlx_impl.data import Batch, Example, make_packed_batch
from mlx_impl.fast import segments
from mlx_impl.fast.forward import FAST
from mlx_impl.fast.kept_positions import KeptPositions, kept_of
from mlx_impl.fast.segments import SubBatch, examples_apart, sub_batches_of
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


def tokens_of(inputs_BT: np.ndarray, sub_batches: Sequence[SubBatch]) -> list[tuple[int, ...]]:
    """Of each row, without its padding."""
    flat, rows = inputs_BT.reshape(-1), []
    for sub_batch in sub_batches:
        part, flat = np.split(flat, [sub_batch.rows * sub_batch.width])
        rows += [tuple(row[row > 0].tolist()) for row in part.reshape(sub_batch)]
    assert not len(flat)
    return rows


def test_each_example_is_a_row_of_its_own() -> None:
    apart, sub_batches = examples_apart(PACKED)
    rows = tokens_of(apart.inputs_BT, sub_batches)
    examples = [example(n, max(1, n // 3)) for n in LENGTHS]
    assert sorted(filter(None, rows)) == sorted(e.tokens[:-1] for e in examples)
    assert apart.mask_BT.sum() == PACKED.mask_BT.sum() and apart.segment_BT is None


def test_what_has_no_target_has_no_row() -> None:
    packed = make_packed_batch([example(20, 3), example(9, 0), example(5, 1)], [(0, 1, 2)])
    apart, sub_batches = examples_apart(packed)
    assert [len(row) for row in tokens_of(apart.inputs_BT, sub_batches) if row] == [20, 5]


def test_a_batch_without_targets_is_one_row() -> None:
    apart, sub_batches = examples_apart(make_packed_batch([example(9, 0), example(5, 0)], [(0, 1)]))
    assert sub_batches == [(1, 16)] and not apart.mask_BT.any()


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([1024] * 8, [(8, 1024)]),
        ([1000] * 7, [(8, 1024)]),
        ([1000] * 4 + [9], [(8, 1024)]),
        ([1640] * 5, [(8, 2048)]),
        ([8192], [(1, 8192)]),
        ([4100] + [60] * 60, [(1, 8192), (64, 64)]),
        ([120] * 9 + [40] * 3, [(16, 128)]),
        ([120] * 8 + [40] * 16, [(8, 128), (16, 64)]),
        ([100] + [1] * 1000, [(64, 128), (1024, 8)]),
        ([900, 500, 200, 200], [(1, 1024), (1, 512), (2, 256)]),
    ],
)
def test_rows_of_similar_length_are_a_sub_batch(lengths: list[int], expected: list[tuple[int, int]]) -> None:
    assert sub_batches_of(lengths, 1, 8192) == expected


def test_no_row_is_wider_than_the_packed_ones() -> None:
    assert sub_batches_of([33], 2, 40) == [(1, 40)]


def fewest_positions(lengths: list[int], width: int) -> int:
    """By trying every choice of widths, with every size of a sub-batch, on rows put down one by one."""
    widths = [8 << n for n in range(20) if 4 << n < width]
    sizes = [1 << n for n in range(20)]
    fewest = []
    for chosen in (c for n in range(1, segments.MAX_SUB_BATCHES + 1) for c in combinations(widths[::-1], n)):
        for size in sizes:
            rows = [w for w in chosen for _ in range(-(-size // w))]
            if len(rows) >= len(lengths) and all(n <= w for n, w in zip(lengths, rows, strict=False)):
                fewest.append(sum(rows))
                break
    return min(fewest)


@pytest.mark.parametrize("seed", range(10))
def test_every_example_fits_and_no_choice_of_widths_has_less_padding(seed: int) -> None:
    random = np.random.default_rng(seed)
    width = int(random.choice([64, 256, 1024]))
    lengths = np.clip(np.exp(random.normal(4, 1, random.integers(1, 60))).astype(int), 1, width)
    falling = np.sort(lengths)[::-1].tolist()
    sub_batches = sub_batches_of(falling, 1, width)
    widths = [sub_batch.width for sub_batch in sub_batches for _ in range(sub_batch.rows)]
    assert len(widths) >= len(falling) and all(n <= w for n, w in zip(falling, widths, strict=False))
    assert len(sub_batches) <= segments.MAX_SUB_BATCHES and sum(widths) == fewest_positions(falling, width)


LIMITS = {"one": 1, "two": 2, "as shipped": segments.MAX_SUB_BATCHES}
LIMITED = pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)


@LIMITED
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 6}, {"qk_norm": True}], ids=str)
def test_loss_and_gradients_are_those_of_the_mask(
    changes: dict[str, Any], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 to 1e-12."""
    monkeypatch.setattr(segments, "MAX_SUB_BATCHES", limit)
    hold_to_the_plain_path(model_of(**changes), PACKED)


@LIMITED
def test_compiled_and_checkpointed_too(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MAX_SUB_BATCHES", limit)
    model = model_of()
    hold_to_the_plain_path(model, PACKED, compiled=True)
    model.model.grad_checkpoint = True
    hold_to_the_plain_path(model, PACKED)


def test_as_shipped_these_rows_are_several_sub_batches() -> None:
    assert len(examples_apart(PACKED)[1]) > 1


def kept_apart(packed: Batch) -> KeptPositions:
    return kept_of(*examples_apart(packed)) or pytest.fail("every position was kept")


def test_what_follows_the_last_target_of_a_row_is_not_computed() -> None:
    """Of each example: the 163 tokens and dummies, 8 more than a bucket of 176."""
    kept = kept_apart(PACKED)
    assert sum(LENGTHS) == 163 and examples_apart(PACKED)[0].inputs_BT.size == 352
    assert kept.is_needed_U.sum() == 163 and len(kept.kept_U) == 176 + 8


@pytest.mark.parametrize("lengths", [(640, 224, 160), (600, 424)], ids=str)
def test_full_packed_rows_need_few_dummies(lengths: tuple[int, ...]) -> None:
    """Not a bucket of them: the one after 1,024 positions has 128 more."""
    packed = make_packed_batch([example(n, n // 2) for n in lengths], [tuple(range(len(lengths)))])
    assert packed.num_tokens == packed.inputs_BT.size == 1024
    assert len(kept_apart(packed).kept_U) == 1024 + 8


def test_full_sub_batches_need_no_dummy() -> None:
    """Every place of both holds a token that a target depends on."""
    packed = make_packed_batch([example(64, 3), *[example(8, 3)] * 8], [(0,), tuple(range(1, 9))])
    kept = kept_apart(packed)
    assert examples_apart(packed)[1] == [(1, 64), (8, 8)]
    assert kept.is_needed_U.all() and len(kept.kept_U) == 128
    hold_to_the_plain_path(model_of(), packed)


def test_a_compiled_step_takes_batches_of_one_shape_and_other_segments() -> None:
    """The sub-batches are a part of what a compiled step is traced for."""
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
    assert len(kept) == 6 and int(kept[-1].sum()) == 9
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
