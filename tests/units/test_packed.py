"""Quantized weights on a CPU: the bits of `mx.dequantize`, the numbers of the plain path, one at a time.

The oracle is the plain module with the dequantized weight under automatic differentiation, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_impl.config import LoRAConfig
from mlx_impl.fast import head, ops, packed, packed_modules
from mlx_impl.fast import head as head_module
from mlx_impl.fast.decode import generate_all
from mlx_impl.fast.head import head_nats, head_of
from mlx_impl.fast.packed import Packed, packed_of
from mlx_impl.fast.packed_modules import unpacking_first
from mlx_impl.fast.projection import project, project_gated
from mlx_impl.fast.unpacking import unpack
from mlx_impl.files.quantized import Quantization, dequantize, quantize_modules
from mlx_impl.generate import generate
from mlx_impl.lora import DoRALinear, LoRALinear, add_lora, lora_layers
from mlx_impl.model import CausalLM
from tests.derived import compare, within_bfloat16
from tests.lora_ladder.cases import SPEC, random_array, random_rows
from tests.nightly import mostly_at_night
from tests.units.peak import peak_bytes
from tests.units.test_head_nats import HEADS, model_of
from tests.units.test_projection import Group, given, hold, numpy, one_by_one, results

pytestmark = pytest.mark.usefixtures("on_the_cpu")

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
I, R = 128, 3  # noqa: E741
LONGEST_SUM = 128  # of the input's width
each_bits = pytest.mark.parametrize("bits", BITS)
each_group = pytest.mark.parametrize("group_size", GROUPS)


@each_bits
@each_group
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_unpacked_weights_are_those_of_dequantize_to_the_bit(
    bits: int, group_size: int, dtype: mx.Dtype
) -> None:
    weight_OI = mx.array(random_array("weight", (40, 2 * I), 0.5)).astype(dtype)
    parts = mx.quantize(weight_OI, group_size, bits)
    ours, expected = unpack(*parts, group_size, bits), mx.dequantize(*parts, group_size, bits)
    assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
    assert mx.array_equal(ours.view(mx.uint8), expected.view(mx.uint8))


@each_bits
def test_every_word_is_unpacked_as_dequantize_does(bits: int) -> None:
    """Random words, so every number of every place in a word occurs; scales of both signs."""
    rng = np.random.default_rng(bits)
    words_OW = mx.array(rng.integers(0, 2**32, (64, 32 * bits), np.uint32))
    scales_OG, biases_OG = (mx.array(rng.standard_normal((64, 32)).astype(np.float32)) for _ in range(2))
    ours = unpack(words_OW, scales_OG, biases_OG, 32, bits)
    assert mx.array_equal(ours, mx.dequantize(words_OW, scales_OG, biases_OG, 32, bits))


KINDS: dict[str, Callable[[nn.QuantizedLinear, int], nn.Module]] = {
    "LoRA": lambda linear, place: adapted(linear, LoRALinear, 0.0, place),
    "DoRA": lambda linear, place: adapted(linear, DoRALinear, 0.0, place),
    "dropout": lambda linear, place: adapted(linear, LoRALinear, 0.5, place),
    "DoRA with dropout": lambda linear, place: adapted(linear, DoRALinear, 0.5, place),
    "no adapter": lambda linear, place: linear,
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def adapted(linear: Any, kind: type[LoRALinear], dropout: float, place: int) -> LoRALinear:
    layer = kind(linear, R, 2.0, dropout)
    num_in, num_out = layer.lora_a.shape[0], layer.lora_b.shape[1]
    layer.lora_a = mx.array(random_array(f"a {place}", (num_in, R), 0.5))
    layer.lora_b = mx.array(random_array(f"b {place}", (R, num_out), 0.5))
    return layer


def group_of(kind: str, bits: int, group_size: int) -> Group:
    """Two linears of this kind about one with a bias; B is not zero."""
    group = Group([])
    group.linears = [
        KINDS[kind](quantized_linear(num_out, bits, group_size, bias=place == 1), place)
        for place, num_out in enumerate((9, 20, 11))
    ]
    return group


def quantized_linear(num_out: int, bits: int, group_size: int, bias: bool = False) -> nn.QuantizedLinear:
    """Its scales, biases and bias are numbers that bfloat16 holds."""
    linear = nn.Linear(I, num_out, bias=bias)
    linear.weight = mx.array(random_array(f"weight {num_out}", (num_out, I), 0.3)).astype(mx.bfloat16)
    if bias:
        linear.bias = mx.array(random_array("bias", (num_out,), 0.5)).astype(mx.bfloat16)
    quantized = nn.QuantizedLinear.from_linear(linear, group_size, bits)
    quantized.freeze()  # its bias too
    return in_type(quantized, mx.float32)


def in_type(module: Any, dtype: mx.Dtype) -> Any:
    """Scales and biases in this type; packed words stay."""
    frozen = [(n, a) for n, a in tree_flatten(module.parameters()) if n.rpartition(".")[2] not in FACTORS]
    module.load_weights([(n, a.astype(dtype)) for n, a in frozen if a.dtype != mx.uint32], strict=False)
    return module


FACTORS = ("lora_a", "lora_b", "magnitude")
Compute = Callable[..., list[mx.array]]


def of(kind: str, bits: int, group_size: int, dtype: mx.Dtype, compute: Compute, **more: Any) -> Any:
    """Values and gradients of the group that is packed, the base in this type and the factors in float32."""
    group = in_type(group_of(kind, bits, group_size), dtype)
    mx.random.seed(1)
    return numpy(results(group, compute, dtype, width=I, **more))


def expected(kind: str, bits: int, group_size: int, dtype: mx.Dtype, of_type: mx.Dtype) -> Any:
    """One by one with weights dequantized in one type, computed in another."""
    group = in_type(group_of(kind, bits, group_size), of_type)
    dequantize(group)
    group.freeze(keys=["weight", "bias"])
    group.load_weights([(n, a.astype(dtype)) for n, a in tree_flatten(group.parameters())])
    mx.random.seed(1)
    return numpy(results(group, one_by_one, dtype, width=I))


def gated(x_BTI: mx.array, *linears: nn.Module) -> list[mx.array]:
    return [project_gated(x_BTI, 2 * x_BTI, linear) for linear in linears]


@each_kind
@each_bits
@each_group
def test_in_float32_packed_linears_equal_plain_ones_within_rounding(
    kind: str, bits: int, group_size: int
) -> None:
    """Values, and gradients of the input and of every factor."""
    how = (kind, bits, group_size)
    ours = of(*how, mx.float32, project)
    ref32, ref64 = (expected(*how, dtype, mx.float32) for dtype in (mx.float32, mx.float64))
    hold(kind, ours, ref64, lambda n: compare(n, ours[n], ref32[n], ref64[n], LONGEST_SUM))


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "no adapter"])
@each_bits
@each_group
def test_in_bfloat16_packed_linears_equal_plain_ones_within_rounding(
    kind: str, bits: int, group_size: int
) -> None:
    how = (kind, bits, group_size)
    ours = of(*how, mx.bfloat16, project)
    ref64 = expected(*how, mx.float64, mx.bfloat16)
    hold(kind, ours, ref64, lambda n: within_bfloat16(n, ours[n], ref64[n], LONGEST_SUM))


@pytest.mark.parametrize("kind", mostly_at_night(list(KINDS), 1))
def test_compiled_packed_linears_equal_plain_ones_within_rounding(kind: str) -> None:
    ours = of(kind, 4, 32, mx.float32, project, compiled=True)
    ref32, ref64 = (expected(kind, 4, 32, dtype, mx.float32) for dtype in (mx.float32, mx.float64))
    hold(kind, ours, ref64, lambda n: compare(n, ours[n], ref32[n], ref64[n], LONGEST_SUM))


@each_kind
def test_a_gated_packed_linear_equals_a_linear_of_the_product(kind: str) -> None:
    ours = of(kind, 4, 32, mx.float32, gated)
    apart = of(kind, 4, 32, mx.float32, lambda x, *all: [project(ops.gated(x, 2 * x), one)[0] for one in all])
    hold(kind, ours, apart, lambda n: compare(n, ours[n], apart[n], apart[n].astype(np.float64), LONGEST_SUM))


@pytest.fixture
def as_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does with few rows."""
    for module in (packed, head):
        monkeypatch.setattr(module, "is_unpacked_for", lambda num_rows: False)


@each_kind
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.usefixtures("as_stored")
def test_linears_packed_as_they_are_equal_plain_ones_within_rounding(kind: str, bits: int) -> None:
    ours = of(kind, bits, 32, mx.float32, project)
    ref32, ref64 = (expected(kind, bits, 32, dtype, mx.float32) for dtype in (mx.float32, mx.float64))
    hold(kind, ours, ref64, lambda n: compare(n, ours[n], ref32[n], ref64[n], LONGEST_SUM))


@pytest.mark.usefixtures("as_stored")
def test_few_rows_on_a_gpu_unpack_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Packed, "unpacked_OI", None)  # a call would raise
    of("LoRA", 4, 32, mx.float32, project)
    of("no adapter", 4, 32, mx.float32, project)
    model = model_of("tied, quantized")
    assert head_of(model, given("x", (2, I), mx.float32)) == model.head


def test_dora_unpacks_a_weight_once_for_its_product_and_its_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """And once more for the gradient of x."""
    count, real = [0], Packed.unpacked_OI

    def counted(weight: Packed, after: mx.array) -> mx.array:
        count[0] += 1
        return real(weight, after)

    monkeypatch.setattr(Packed, "unpacked_OI", counted)
    of("DoRA", 4, 32, mx.float32, project)
    assert count[0] == 2 * 3


def test_a_device_and_the_number_of_rows_decide_whether_weights_are_unpacked_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert packed.is_unpacked_for(1)
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    fewest = packed.CUDA_MIN_ROWS
    assert [packed.is_unpacked_for(rows) for rows in (1, fewest - 1, fewest)] == [False, False, True]
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert not packed.is_unpacked_for(10**6)


def test_a_gpu_unpacks_with_its_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "unpack", None)  # a call would raise
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    weight = packed_of(quantized_linear(9, 4, 32))
    assert weight is not None and weight.unpacked_OI(after=mx.array(0)).shape == (9, I)


# What is in memory at once. A weight takes WEIGHT bytes in full, and a hidden state a 64th of that.
WIDTH, ROWS, FEW, MORE = 512, 8, 2, 30
WEIGHT = 4 * WIDTH * WIDTH
LATE = 10  # arrays that MLX may free late; see test_memory.py


class Chain(nn.Module):
    """Packed linears of one width one after the other; each two of them have one input."""

    def __init__(self, kind: str, num_layers: int) -> None:
        super().__init__()
        self.layers: list[Any] = []
        for place in range(num_layers):
            linear = nn.QuantizedLinear(WIDTH, WIDTH, bias=False, group_size=32, bits=4)
            self.layers.append(KINDS[kind](linear, place))

    def __call__(self, compute: Compute, x_NI: mx.array) -> mx.array:
        for first, second in zip(self.layers[::2], self.layers[1::2], strict=True):
            x_NI = sum(compute(x_NI, first, second), mx.array(0.0))
        return x_NI.sum()


def keeping(x_NI: mx.array, *linears: Any) -> list[mx.array]:
    """The mutant: automatic differentiation keeps every weight in full for the gradient of the input."""
    bases = [getattr(linear, "linear", linear) for linear in linears]
    parts = [(b.weight, b.scales, b.biases, b.group_size, b.bits) for b in bases]
    return [x_NI @ mx.dequantize(*part).T for part in parts]


def weights_a_layer(kind: str, compute: Compute, compiled: bool) -> float:
    """The slope of the peak over the number of layers, in weights."""

    def peak(num_layers: int) -> int:
        chain, x_NI = Chain(kind, num_layers), mx.ones((ROWS, WIDTH))
        mx.eval(chain.parameters(), x_NI)
        run: Any = mx.value_and_grad(partial(chain, compute))
        run = mx.compile(run, inputs=[chain.state], outputs=[chain.state]) if compiled else run
        return min(peak_bytes(run, x_NI) for _ in range(2))

    return (peak(FEW + MORE) - peak(FEW)) / MORE / WEIGHT


@pytest.mark.parametrize(
    ("kind", "compiled"),
    [("LoRA", False), ("DoRA", False), ("no adapter", False), ("LoRA", True)],
)
def test_no_weight_is_kept_in_full(kind: str, compiled: bool) -> None:
    """What is late is at most LATE weights in full, and each layer brings factors and hidden states."""
    assert weights_a_layer(kind, project, compiled) < LATE / MORE + 0.1


def test_automatic_differentiation_would_keep_each_weight_in_full() -> None:
    assert weights_a_layer("no adapter", keeping, compiled=False) > 0.9


def test_without_waiting_a_compiled_step_would_keep_each_weight_in_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mutant: both products ask for the same unpacking, and a compiler computes it once."""
    monkeypatch.setattr(Packed, "unpacked_OI", lambda weight, after: unpack(*weight))
    assert weights_a_layer("LoRA", project, compiled=True) > 0.9


@pytest.mark.parametrize("rows", [7, 10**6], ids=["in parts", "at once"])
@pytest.mark.parametrize("head", [name for name in HEADS if name.endswith("quantized")])
@pytest.mark.parametrize("group_size", [32])
@each_bits
def test_a_packed_head_equals_the_dequantized_one_within_rounding(
    head: str, bits: int, group_size: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum of nats and its gradient by the hidden states."""
    monkeypatch.setattr(head_module, "PACKED_ROWS", rows)
    name = "model.embed_tokens" if head.startswith("tied") else "lm_head"
    model = model_of(head.partition(",")[0])
    weight_VD = dict(tree_flatten(model.parameters()))[f"{name}.weight"]
    quantize_modules(model, {name: Quantization(group_size, bits)})
    parts = zip(("weight", "scales", "biases"), mx.quantize(weight_VD, group_size, bits), strict=True)
    model.load_weights([(f"{name}.{kind}", array) for kind, array in parts], strict=False)
    V, D = weight_VD.shape
    targets_N = mx.arange(13) * 4

    def nats_and_gradient(model: CausalLM, dtype: mx.Dtype) -> dict[str, np.ndarray]:
        def nats(x_ND: mx.array) -> mx.array:
            return head_nats(head_of(model, x_ND), V, x_ND, targets_N, mx.ones(13, mx.bool_))[0]

        value, gradient = mx.value_and_grad(nats)(given("x", (13, D), dtype))
        return {"nats": np.array(value), "dx": np.array(gradient)}

    ours = nats_and_gradient(model, mx.float32)
    dequantize(model)
    ref32 = nats_and_gradient(model, mx.float32)
    model.load_weights([(n, a.astype(mx.float64)) for n, a in tree_flatten(model.parameters())])
    ref64 = nats_and_gradient(model, mx.float64)
    hold(head, ours, ref64, lambda n: compare(n, ours[n], ref32[n], ref64[n], V))


def test_a_packed_head_is_never_in_memory_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: a few parts of it are, in loss and gradient."""
    V, D = 40 * 512, 64
    model = CausalLM(replace(SPEC, vocab_size=V, hidden_size=D, tie_word_embeddings=True))
    quantize_modules(model, {"model.embed_tokens": Quantization(32, 4)})
    x_ND, targets_N = given("x", (2, D), mx.float32), mx.arange(2)
    mx.eval(model.parameters(), x_ND, targets_N)

    def peak(rows: int) -> int:
        monkeypatch.setattr(head_module, "PACKED_ROWS", rows)
        loss = lambda x: head_nats(head_of(model, x), V, x, targets_N, mx.ones(2, mx.bool_))[0]  # noqa: E731
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.grad(loss)(x_ND))
        return mx.get_peak_memory() - before

    in_full = V * D * 4
    assert peak(V) > in_full
    assert peak(512) < 0.25 * in_full


def quantized_model(use_dora: bool) -> CausalLM:
    """Every linear and the tied embedding, whose logits decide, in 8 bits; B is not zero."""
    model = CausalLM(replace(SPEC, hidden_size=64, intermediate_size=128, num_attention_heads=4, head_dim=16))
    nn.quantize(model, 32, 8)
    add_lora(model, LoRAConfig(rank=R, alpha=4.0, use_dora=use_dora))
    for number, layer in enumerate(lora_layers(model).values()):
        layer.lora_b = mx.array(random_array(f"b {number}", layer.lora_b.shape, 0.1))
    return model


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("min_rows", [1, 3, 10**6])
def test_answers_do_not_depend_on_the_rows_from_which_weights_are_unpacked(
    min_rows: int, use_dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`packed_modules.MIN_ROWS`: four prompts, decoded together, and alone by the pattern."""
    monkeypatch.setattr(packed_modules, "MIN_ROWS", min_rows)
    mx.random.seed(3)
    model = quantized_model(use_dora)
    prompts = random_rows(SPEC.vocab_size, (3, 1, 9, 4))
    alone = [list(generate(model, prompt, 5, stop_ids=())) for prompt in prompts]
    assert generate_all(model, prompts, 5, stop_ids=()) == alone


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_while_it_generates_a_model_has_the_same_logits_and_after_it_the_same_modules(use_dora: bool) -> None:
    model, tokens_BT = quantized_model(use_dora), mx.array([[1, 5, 9, 30], [7, 7, 2, 4]])
    kinds, plain = [type(module) for module in model.modules()], np.array(model(tokens_BT))
    with unpacking_first(model):
        ours = np.array(model(tokens_BT))
        assert {packed_modules.UNPACKING[nn.QuantizedLinear]} <= {type(module) for module in model.modules()}
    assert [type(module) for module in model.modules()] == kinds
    verdict = compare("logits", ours, plain, plain.astype(np.float64), LONGEST_SUM)
    assert verdict.used <= 1, verdict.report


def test_a_dora_linear_that_is_not_quantized_generates_as_it_is() -> None:
    layer: Any = adapted(nn.Linear(I, 9), DoRALinear, 0.0, 0)
    with unpacking_first(layer):
        assert type(layer) is DoRALinear
