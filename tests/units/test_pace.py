"""The memory limit of a GPU's steps: set for each, given back afterwards; a CPU is left alone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import mlx.core as mx
import pytest

from mlx_impl.config import LoRAConfig
from mlx_impl.data import Example, make_batch, make_packed_batch
from mlx_impl.fast import ops, pace
from mlx_impl.fast.memory_kept import block_bytes
from mlx_impl.fast.memory_model import state_bytes, training_bytes
from mlx_impl.fast.memory_sizes import Shape, sizes_of
from mlx_impl.fast.pace import paced, queued, step_bytes
from mlx_impl.lora import add_lora
from mlx_impl.model import CausalLM
from tests.lora_ladder.cases import SPEC

BEFORE = 10**12  # bytes: no limit for a model as small as this
SHORT, LONG = ([make_batch([Example((1,) * n, (True,) * n)] * 2)] for n in (9, 33))


def adapted(num_layers: int = 2) -> CausalLM:
    model = CausalLM(replace(SPEC, num_hidden_layers=num_layers))
    add_lora(model, LoRAConfig(rank=2))
    return model


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What a GPU's memory limit was set to, the last one being that of now."""
    found = [BEFORE]

    def set_memory_limit(limit: int) -> int:
        found.append(limit)
        return found[-2]

    on_a_gpu: dict[str, Any] = {
        "default_device": lambda: mx.gpu,
        "set_memory_limit": set_memory_limit,
        "get_active_memory": lambda: 0,
    }
    monkeypatch.setattr(pace, "mx", SimpleNamespace(**{**vars(mx), **on_a_gpu}))
    return found


def test_each_window_has_the_limit_of_its_own_largest_batch(limits: list[int]) -> None:
    model = adapted()
    for window in paced([SHORT, SHORT + LONG], model, checkpointed=False):
        assert limits[-1] == max(step_bytes(sizes_of(model), batch, False) for batch in window)
    assert limits[-3] < limits[-2]


@pytest.mark.parametrize("others", [0, 10**6])
def test_what_others_hold_is_added_to_the_limit(
    others: int, limits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX counts it too: without it a step beside another model would wait for each of its kernels."""
    model = adapted()
    sizes = sizes_of(model)
    active = sizes.weights + state_bytes(sizes) + others
    monkeypatch.setattr("mlx_impl.fast.pace.mx.get_active_memory", lambda: active)
    for _ in paced([LONG], model, checkpointed=False):
        assert limits[-1] == others + step_bytes(sizes, LONG[0], False)


def test_packed_examples_attend_in_rows_of_their_own() -> None:
    """Where attention keeps its weights, 16 examples of 64 tokens have a 16th of those of 1,024 tokens."""
    many, one = (
        make_packed_batch([Example((1,) * (n + 1), (False,) + (True,) * n)] * count, [tuple(range(count))])
        for n, count in ((64, 16), (1024, 1))
    )
    assert many.inputs_BT.shape == one.inputs_BT.shape == (1, 1024)
    sizes = replace(sizes_of(adapted()), keeps_scores=True)
    weights = 4 * sizes.config.num_attention_heads * (1024**2 - 16 * 64**2)  # bytes more in each block
    for checkpointed, blocks in ((False, sizes.config.num_hidden_layers), (True, 1)):
        saved = step_bytes(sizes, one, checkpointed) - step_bytes(sizes, many, checkpointed)
        assert saved > blocks * weights


def test_the_host_may_run_ahead_by_four_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    sizes, (batch,) = sizes_of(adapted()), LONG
    rows, width = batch.inputs_BT.shape
    shape = Shape(rows, width, rows * width, int(batch.mask_BT.sum()))
    more = step_bytes(sizes, batch, False) - training_bytes(sizes, shape, False)
    assert more == pace.BLOCKS_AHEAD * block_bytes(sizes, shape) == 4 * block_bytes(sizes, shape) > 0


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_gpu_begins_with_the_gradients_before_the_update_is_built(
    on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums are the same; a CPU, which would run no more than ten operations ahead, is left alone."""
    monkeypatch.setattr(ops, "on_gpu", lambda: on_gpu)
    begun: list[Any] = []
    monkeypatch.setattr(pace, "mx", SimpleNamespace(async_eval=begun.append))
    sums = ((mx.array(2.0), mx.array(1)), {"lora_a": mx.ones(3)})
    assert queued(lambda parts: [part() for part in parts][-1])([lambda: sums]) is sums
    assert begun == [sums] * on_gpu


def test_a_model_is_measured_once(limits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes as long as a tenth of a GPU's step."""
    measure = Mock(wraps=sizes_of)
    monkeypatch.setattr(pace, "sizes_of", measure)
    assert len(list(paced([SHORT, LONG, SHORT], adapted(), checkpointed=False))) == 3
    assert measure.call_count == 1


def test_a_limit_that_was_lower_stays(limits: list[int]) -> None:
    limits[0] = 1000
    for _ in paced([LONG], adapted(), checkpointed=False):
        assert limits[-1] == 1000


@pytest.mark.parametrize("num_read", [1, 2])
def test_the_limit_is_given_back_however_the_run_ends(num_read: int, limits: list[int]) -> None:
    windows = paced([SHORT, LONG], adapted(), checkpointed=False)
    for _ in range(num_read):
        next(windows)
    windows.close()
    assert limits[-1] == BEFORE


def test_a_cpu_is_left_alone(limits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_impl.fast.pace.mx.default_device", lambda: mx.cpu)
    assert list(paced([SHORT, LONG], adapted(), checkpointed=False)) == [SHORT, LONG]
    assert limits == [BEFORE]


def test_a_checkpointed_layer_needs_one_hidden_state() -> None:
    """Of the batch; beside it only its weights and the copies of what it trains."""
    few, many = adapted(2), adapted(3)
    (batch,) = LONG
    kept, recomputed = (
        step_bytes(sizes_of(many), batch, is_checkpointed) - step_bytes(sizes_of(few), batch, is_checkpointed)
        for is_checkpointed in (False, True)
    )
    queries = SPEC.num_attention_heads * SPEC.head_dim
    per_token = 3 * SPEC.hidden_size + 2 * SPEC.num_key_value_heads * SPEC.head_dim
    per_token += 3 * SPEC.intermediate_size
    if ops.on_gpu():
        assert kept - recomputed == 4 * batch.inputs_BT.size * (per_token + 3 * queries)
        return
    # Scores, and of each of seven linears x A; the factors as they are multiplied with.
    per_token += 2 * queries + SPEC.num_attention_heads * batch.inputs_BT.shape[1] + 7 * 2
    factors = sizes_of(many).trained - sizes_of(few).trained
    assert kept - recomputed == 4 * (batch.inputs_BT.size * per_token + factors)
