"""Fast paths beside their plain twins: a registry. A new fast path gets a line here.

A pair is two steps with the same result. The fast one may take at most a committed share of the plain one's
time. Both are timed in one process. That their results agree is tested elsewhere (tests/units,
tests/lora_ladder).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

from .cases import CASES, SMALL
from .gate import Verdict, judge
from .interleave import abba, timed

Step = Callable[[], object]
NUM_PAIRS = 20


@dataclass(frozen=True)
class Pair:
    build: Callable[[], tuple[Step, Step]]  # (fast, plain), each blocks until it is done
    at_most: float  # seconds of the fast step / seconds of the plain one
    why: str


def evaluated(function: Callable[..., Any], *arguments: Any) -> Step:
    """A step that computes function(*arguments) and waits for it."""
    import mlx.core as mx

    def step() -> None:
        mx.eval(function(*arguments))
        mx.synchronize()

    return step


def gradients(function: Callable[..., Any], *arrays: Any) -> Step:
    """A step that computes the sum of function(*arrays) and its gradient by every array."""
    import mlx.core as mx

    run = mx.value_and_grad(lambda *arrays: function(*arrays).sum(), argnums=tuple(range(len(arrays))))
    return evaluated(run, *arrays)


def attention_of_short_rows() -> tuple[Step, Step]:
    """Attention and its gradients: heads and width of SmolLM2, four rows of 56."""
    import mlx.core as mx

    from mlx_impl.fast import ops

    q_BHTK, (k_BGTK, v_BGTK) = mx.random.normal((4, 9, 56, 64)), mx.random.normal((2, 4, 3, 56, 64))

    def plain(q_BHTK: Any, k_BGTK: Any, v_BGTK: Any) -> Any:
        return mx.fast.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, scale=0.125, mask="causal")

    arrays = (q_BHTK, k_BGTK, v_BGTK)

    def fast(q_BHTK: Any, k_BGTK: Any, v_BGTK: Any) -> Any:
        return ops.attention(q_BHTK, k_BGTK, v_BGTK, None)

    return gradients(fast, *arrays), gradients(plain, *arrays)


def head_at_targets() -> tuple[Step, Step]:
    """Loss and its gradient by the hidden state; a quarter of the positions are targets."""
    import mlx.core as mx

    from mlx_impl.loss import next_token_nats

    N, D, V, every = 256, 256, 8192, 4
    x_ND, head_DV = mx.random.normal((N, D)), mx.random.normal((D, V)) / math.sqrt(D)
    targets_N, positions_M = mx.arange(N), mx.arange(0, N, every)
    mask_N = targets_N % every == 0

    def fast(x_ND: Any) -> Any:
        logits_MV = x_ND[positions_M] @ head_DV
        return next_token_nats(logits_MV[None], targets_N[positions_M], mask_N[positions_M])[0]

    def plain(x_ND: Any) -> Any:
        return next_token_nats((x_ND @ head_DV)[None], targets_N, mask_N)[0]

    return evaluated(mx.value_and_grad(fast), x_ND), evaluated(mx.value_and_grad(plain), x_ND)


def gate_and_up() -> tuple[Step, Step]:
    """silu(gate) * up and both gradients, at the width of SmolLM2."""
    import mlx.core as mx

    from mlx_impl import ops as plain_ops
    from mlx_impl.fast import ops

    gate_BTF, up_BTF = mx.random.normal((2, 4, 64, 1536))

    def plain(gate_BTF: Any, up_BTF: Any) -> Any:
        return plain_ops.silu(gate_BTF) * up_BTF

    return gradients(ops.gated, gate_BTF, up_BTF), gradients(plain, gate_BTF, up_BTF)


def linears_of_one_input(use_dora: bool = False) -> tuple[Step, Step]:
    """Queries, keys and values at the width of SmolLM2, with the gradients of the factors."""
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_impl.fast.projection import project
    from mlx_impl.lora import DoRALinear, LoRALinear

    x_BTD, kind = mx.random.normal((4, 64, 576)), DoRALinear if use_dora else LoRALinear
    layers = [kind(nn.Linear(576, size, bias=False), 8, 2.0, 0.0) for size in (576, 192, 192)]
    model = nn.Sequential(*layers)
    model.apply_to_modules(
        lambda _, module: module.freeze(recurse=False) if type(module) is nn.Linear else None
    )

    def of_factors(outputs: Callable[..., Any]) -> Step:
        function = nn.value_and_grad(model, lambda x_BTD: sum(y.sum() for y in outputs(x_BTD)))
        return evaluated(function, x_BTD)

    return of_factors(lambda x: project(x, *layers)), of_factors(lambda x: [layer(x) for layer in layers])


def quantized_linear() -> tuple[Step, Step]:
    """A linear of SmolLM2 in 4 bits on 64 rows, with the gradient of its input; on the CPU of any machine."""
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_impl.fast.projection import project
    from mlx_impl.lora import LoRALinear

    mx.set_default_device(mx.cpu)
    linear = nn.QuantizedLinear(576, 1536, bias=False, group_size=32, bits=4)
    layer, x_ND = LoRALinear(linear, 8, 2.0, 0.0), mx.random.normal((64, 576))
    return gradients(lambda x_ND: project(x_ND, layer)[0], x_ND), gradients(layer, x_ND)


def head_and_loss_in_one() -> tuple[Step, Step]:
    """The loss of 64 targets over SmolLM2's vocabulary, and its gradient by the hidden state."""
    import mlx.core as mx

    from mlx_impl.fast.head import head_nats
    from mlx_impl.loss import next_token_nats

    N, D, V = 64, 576, 49152
    x_ND, head_VD = mx.random.normal((N, D)), mx.random.normal((V, D)) / math.sqrt(D)
    targets_N, mask_N = mx.arange(N), mx.arange(N) >= 0

    def head(x_ND: Any) -> Any:
        return x_ND @ head_VD.T

    def fast(x_ND: Any) -> Any:
        return head_nats(head, V, x_ND, targets_N, mask_N)[0]

    def plain(x_ND: Any) -> Any:
        return next_token_nats(head(x_ND)[None], targets_N, mask_N)[0]

    return evaluated(mx.value_and_grad(fast), x_ND), evaluated(mx.value_and_grad(plain), x_ND)


def rows_of_unequal_lengths() -> tuple[Step, Step]:
    """Loss and gradients of a small model on four rows, half of whose positions are padding."""
    import mlx.nn as nn

    from mlx_impl.config import LoRAConfig
    from mlx_impl.data import Example, make_batch
    from mlx_impl.fast.forward import batch_loss, to_arrays
    from mlx_impl.lora import add_lora
    from mlx_impl.model import CausalLM

    model = CausalLM(SMALL)
    add_lora(model, LoRAConfig(rank=8))
    rows = [Example((1,) * (n + 1), (False,) * (n - 7) + (True,) * 8) for n in (128, 64, 48, 16)]
    *arrays, kept = to_arrays(make_batch(rows))
    assert kept
    run = nn.value_and_grad(model, batch_loss)
    return evaluated(run, model, [*arrays, kept]), evaluated(run, model, [*arrays, []])


def rows_with_one_system_prompt() -> tuple[Step, Step]:
    """Loss and gradients of SmolLM2 on four geography questions with a shared prefix of 29 tokens."""
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_impl.fast import kept_positions
    from mlx_impl.fast.forward import batch_loss, to_arrays
    from mlx_impl.lora import add_lora
    from mlx_impl.model import CausalLM

    from .inputs import read_inputs

    case = CASES["smollm2"]
    inputs = read_inputs(case)
    model = CausalLM(inputs.config)
    model.load_weights([(name, mx.array(array)) for name, array in inputs.weights.items()])
    add_lora(model, case.lora)
    run, batch = nn.value_and_grad(model, batch_loss), inputs.windows[0][0]
    fast = to_arrays(batch)
    with patch.object(kept_positions, "shared_prefix_length", lambda batch, is_needed_BT: 0):
        plain = to_arrays(batch)
    assert len(fast[-1][0]) < len(plain[-1][0])
    return evaluated(run, model, fast), evaluated(run, model, plain)


PAIRS = {
    "padding": Pair(rows_of_unequal_lengths, at_most=0.75, why="skips positions that no target depends on"),
    "one-prompt": Pair(rows_with_one_system_prompt, at_most=0.80, why="computes a shared prefix once"),
    "attention": Pair(
        attention_of_short_rows, at_most=1.0, why="query heads that share keys: rows of one product"
    ),
    "head-at-targets": Pair(head_at_targets, at_most=0.35, why="no logits for prompts and padding"),
    "gated": Pair(gate_and_up, at_most=1.0, why="takes the exponential once for value and gradient"),
    "projection": Pair(linears_of_one_input, at_most=1.0, why="one product for all A; addmm adds the update"),
    "dora": Pair(
        partial(linears_of_one_input, use_dora=True), at_most=0.9, why="lengths from small products"
    ),
    "quantized": Pair(
        quantized_linear, at_most=0.25, why="unpacks the weight first, and multiplies with a BLAS"
    ),
    "head-nats": Pair(head_and_loss_in_one, at_most=1.0, why="loss and gradient from the same exponentials"),
}


@dataclass(frozen=True)
class Judged:
    verdict: Verdict
    fast_seconds: list[float]


def judge_pair(name: str) -> Judged:
    """Times the pair in this process, whose BLAS must be loaded already."""
    pair = PAIRS[name]
    fast_step, plain_step = (timed(step) for step in pair.build())
    for _ in range(3):
        fast_step(), plain_step()
    fast_seconds: list[float] = []

    def measure(num_pairs: int) -> tuple[list[float], list[float]]:
        fast, plain = abba(fast_step, plain_step, num_pairs)
        fast_seconds.extend(fast)
        return fast, plain

    return Judged(judge(measure, pair.at_most, NUM_PAIRS), fast_seconds)
