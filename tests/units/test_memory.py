"""What a step keeps for its backward pass, counted in bytes on the CPU: what is listed, and nothing else.

MLX runs an operation when its result is asked for, and frees an array when the last operation that reads it
has run. The gradients of the factors are asked for last: without `mx.depends` MLX would keep every input and
every output's gradient until then. The mutants here leave `mx.depends` out.

What a layer keeps is the slope of the peak over the number of layers: what else the peak holds does not grow
with them. The quotient of two peaks is near that slope; how near follows from the way MLX frees memory. One
thread allocates arrays and hands operations to a second, which runs them and frees what each was the last to
read. At a memory limit the first waits for the second, but only once in ten dispatches (`DISPATCHES_PER_TASK`
in mlx/backend/cpu/encoder.h); an operation makes two dispatches, and reads up to two arrays. So a peak may
hold LATE arrays that the graph no longer needs, depending on how fast the two threads happen to run, and the
quotient may be LATE / MORE arrays from the slope, either way, since both peaks may hold them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_impl.config import LoRAConfig
from mlx_impl.fast import forward, ops, projection, reading, recompute
from mlx_impl.fast.forward import batch_loss
from mlx_impl.fast.kv_cache import KVCache
from mlx_impl.fast.projection import project
from mlx_impl.lora import DoRALinear, LoRALinear, add_lora
from mlx_impl.model import CausalLM
from mlx_impl.ops import silu
from mlx_impl.train import Arrays
from tests.lora_ladder.cases import SPEC as NARROW
from tests.lora_ladder.cases import random_rows
from tests.nightly import mostly_at_night
from tests.units.peak import peak_bytes

pytestmark = pytest.mark.usefixtures("on_the_cpu")

N, I, R = 512, 64, 2  # noqa: E741
B, T = 16, 16
BYTES = 4  # of a float32
FEW, MORE = 2, 30  # layers
LATE = 10  # arrays
SPEC = replace(
    NARROW, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16
)

eager_and_compiled = pytest.mark.parametrize(
    "compiled", mostly_at_night([False, True], 1), ids=["eager", "compiled"]
)


class Chain(nn.Module):
    """Adapted linears one after the other."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = [LoRALinear(nn.Linear(I, I, bias=False), R, 2.0, 0.0) for _ in range(num_layers)]
        for layer in self.layers:
            layer.linear.freeze()

    def __call__(self, x_NI: mx.array) -> mx.array:
        for layer in self.layers:
            (x_NI,) = project(x_NI, layer)
        return x_NI.sum()


def chain_bytes(num_layers: int, compiled: bool) -> int:
    """The peak of loss and gradients: the least of three, since what is freed late only adds to it."""
    chain, x_NI = Chain(num_layers), mx.ones((N, I))
    mx.eval(chain.parameters(), x_NI)
    run = nn.value_and_grad(chain, lambda x_NI: chain(x_NI))
    run = mx.compile(run, inputs=[chain.state], outputs=[chain.state]) if compiled else run
    return min(peak_bytes(run, x_NI) for _ in range(3))


def bytes_a_link(compiled: bool) -> float:
    return (chain_bytes(FEW + MORE, compiled) - chain_bytes(FEW, compiled)) / MORE


def without_depends(monkeypatch: pytest.MonkeyPatch, module: Any, which: Callable[[list], bool]) -> None:
    """Leave out `mx.depends` in this module, for these arrays."""

    def depends(arrays: list, on: list) -> list:
        return arrays if which(arrays) else mx.depends(arrays, on)

    monkeypatch.setattr(module, "mx", SimpleNamespace(**{**vars(mx), "depends": depends}))


# Its input, x A, the gradients of its factors, and a few numbers such as its scale.
LINK = BYTES * (N * I + N * R + 2 * I * R + 64)
OF_A_LINK = LATE * BYTES * N * I / MORE


@eager_and_compiled
def test_a_linear_keeps_its_input_and_no_gradient_of_its_output(compiled: bool) -> None:
    assert bytes_a_link(compiled) <= LINK + OF_A_LINK


@eager_and_compiled
def test_the_factors_gradients_are_formed_before_that_of_the_input(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a short chain keeps half as much again; of a long one MLX looks only so far ahead."""
    with_depends = chain_bytes(8, compiled)
    without_depends(monkeypatch, projection, lambda arrays: True)
    assert chain_bytes(8, compiled) > 1.25 * with_depends


def test_linears_of_dora_hold_one_weight_in_full_after_another() -> None:
    """And its squares; were a length not computed before the next linear, every weight until the end."""
    bases = [nn.QuantizedLinear.from_linear(nn.Linear(256, 1024, bias=False), 32, 4) for _ in range(6)]
    layers, x_NI = [DoRALinear(base, R, 2.0, 0.0) for base in bases], mx.ones((8, 256))
    mx.eval(x_NI, [layer.parameters() for layer in layers])
    assert peak_bytes(lambda x_NI: project(x_NI, *layers), x_NI) < 3 * BYTES * 256 * 1024


def step_bytes(num_layers: int, lora: LoRAConfig, checkpointed: bool, compiled: bool) -> int:
    """The peak of a model's loss and gradients, beyond its weights."""
    model = CausalLM(replace(SPEC, num_hidden_layers=num_layers))
    add_lora(model, lora)
    model.train()
    model.model.grad_checkpoint = checkpointed
    tokens_BT = mx.array(random_rows(SPEC.vocab_size, [T] * B))
    arrays: Arrays = [tokens_BT, mx.arange(B * T), tokens_BT.flatten(), mx.ones(B * T, mx.bool_), [], []]
    mx.eval(model.parameters(), arrays)
    run = nn.value_and_grad(model, lambda arrays: batch_loss(model, arrays))
    state = [model.state, mx.random.state]
    return peak_bytes(mx.compile(run, inputs=state, outputs=state) if compiled else run, arrays)


def hidden_states_a_layer(lora: LoRAConfig, checkpointed: bool, compiled: bool) -> float:
    """In units of B T D numbers."""
    few, many = (step_bytes(num, lora, checkpointed, compiled) for num in (FEW, FEW + MORE))
    return (many - few) / MORE / UNIT


UNIT = BYTES * B * T * SPEC.hidden_size
D, F, QUERIES = SPEC.hidden_size, SPEC.intermediate_size, SPEC.num_attention_heads * SPEC.head_dim
KEYS = SPEC.num_key_value_heads * SPEC.head_dim
LARGEST = max(F, SPEC.num_attention_heads * T) / D  # of a block's arrays
# Beside what a layer is said to keep: the gradients of its factors, and what is late.
MARGIN = BYTES * R * (2 * (D + QUERIES) + 2 * (D + KEYS) + 3 * (D + F)) / UNIT + LATE * LARGEST / MORE

PLAIN, DROPPING = LoRAConfig(rank=R), LoRAConfig(rank=R, dropout=0.1)


@pytest.mark.parametrize(
    ("lora", "compiled"),
    mostly_at_night([(PLAIN, False), (DROPPING, True), (PLAIN, True), (DROPPING, False)], 2),
    ids=["plain-eager", "dropout-compiled", "plain-compiled", "dropout-eager"],
)
def test_a_recomputed_layer_keeps_one_hidden_state(lora: LoRAConfig, compiled: bool) -> None:
    """And not 17. A compiled step with dropout would draw all masks ahead, if their keys did not wait."""
    assert 1 - MARGIN <= hidden_states_a_layer(lora, True, compiled) <= 1 + MARGIN


@pytest.mark.parametrize(("on_gpu", "times"), [(False, [4] * 6), (True, [4] * 5 + [2])])
def test_a_gpu_recomputes_all_blocks_but_the_last(
    on_gpu: bool, times: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in two steps, each forward and backward."""
    calls: Counter[int] = Counter()
    monkeypatch.setattr(ops, "on_gpu", lambda: on_gpu)
    monkeypatch.setattr(forward, "block", counting(forward.block, calls))
    step_bytes(6, DROPPING, checkpointed=True, compiled=False)
    assert [*calls.values()] == times


def counting(block: Any, calls: Counter[int]) -> Any:
    """The same, and how often each layer was computed."""

    def counted(layer: Any, *rest: Any) -> mx.array:
        calls[id(layer)] += 1
        y_BTD: mx.array = block(layer, *rest)
        return y_BTD

    return counted


@pytest.mark.nightly  # as the claim about a compiled step, whose mutant it is
def test_a_block_is_not_recomputed_before_its_gradient_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a compiled step recomputes several blocks ahead, and keeps their activations."""
    without_depends(monkeypatch, recompute, lambda arrays: len(arrays) > 1)  # a block's inputs
    assert hidden_states_a_layer(DROPPING, True, compiled=True) > 2 + MARGIN


def test_a_blocks_factors_gradients_are_formed_before_that_of_its_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else they are computed at the end, where a linear is computed by its plain call, as on a GPU."""
    monkeypatch.setattr(projection, "low_rank_of", lambda _: None)
    with_depends = step_bytes(6, DROPPING, checkpointed=True, compiled=False)
    without_depends(monkeypatch, recompute, lambda arrays: len(arrays) == 1)  # d of a block's input
    assert step_bytes(6, DROPPING, checkpointed=True, compiled=False) > with_depends + LATE * UNIT


# Of each token: both residuals and both norms; q, the mix of values, and that in the order of tokens; k, v;
# gate, its sigmoid, and up, but not their product; the weights of attention, on a CPU.
LISTED = (4 * D + 3 * QUERIES + 2 * KEYS + 3 * F + SPEC.num_attention_heads * T) / D


@eager_and_compiled
def test_a_layer_keeps_no_more_than_is_listed(compiled: bool) -> None:
    assert hidden_states_a_layer(PLAIN, False, compiled) <= LISTED + MARGIN


@eager_and_compiled
@pytest.mark.nightly
def test_a_gate_without_its_own_gradient_keeps_more(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: automatic differentiation also keeps silu(gate) and its product with up."""
    derived = lambda gate, up, linear: projection.project(silu(gate) * up, linear)[0]  # noqa: E731
    monkeypatch.setattr(forward, "project_gated", derived)
    assert hidden_states_a_layer(PLAIN, False, compiled) > LISTED + MARGIN


@eager_and_compiled
@pytest.mark.nightly
def test_a_linear_that_keeps_its_input_keeps_more(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: the gate's product is not computed again, so F numbers a token are kept."""
    kept = lambda gate, up, linear: projection.project(ops.gated(gate, up), linear)[0]  # noqa: E731
    monkeypatch.setattr(forward, "project_gated", kept)
    assert hidden_states_a_layer(PLAIN, False, compiled) > LISTED + MARGIN


def test_a_prompt_in_parts_holds_the_scores_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 parts 4 at most; were the parts not computed one after the other, 7."""
    parts, width = 16, 64
    monkeypatch.setattr(reading, "PROMPT_POSITIONS", width)
    model = CausalLM(NARROW).eval()
    tokens_BT = mx.array(random_rows(NARROW.vocab_size, [parts * width]))
    mx.eval(model.parameters(), tokens_BT)
    scores = BYTES * NARROW.num_attention_heads * width * parts * width  # of the last part in one block

    def read(tokens_BT: mx.array) -> mx.array:
        return reading.read_prompt(model, tokens_BT, [KVCache() for _ in model.model.layers])

    assert peak_bytes(read, tokens_BT) < 4 * scores
