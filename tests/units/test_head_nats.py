"""Chunked cross-entropy equals the plain one, and never holds the logits of two chunks.

The oracle is `loss.next_token_nats(model.head(x))` under automatic differentiation, in float64.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from mlx_impl.data import Batch
from mlx_impl.fast import head as head_module
from mlx_impl.fast import ops
from mlx_impl.fast.forward import FAST
from mlx_impl.fast.head import head_nats
from mlx_impl.files.quantized import Quantization, dequantize, quantize_modules
from mlx_impl.loss import next_token_nats
from mlx_impl.model import CausalLM
from tests.derived import compare, require, require_same_names, within, within_bfloat16, within_exact
from tests.lora_ladder.cases import SPEC, random_array
from tests.lora_ladder.protocol import Arrays
from tests.trainers.exact_ops import in_place_of_production
from tests.units.peak import peak_bytes

pytestmark = pytest.mark.usefixtures("on_the_cpu")

N, D, V = 13, 32, 61
UPSTREAM = 2.5
CHUNKS = (1, 4, 5, 13, 100)  # positions; 4 and 5 leave a last chunk that is not full
MASKS = {
    "every target": np.ones(N, bool),
    "padding at the end": np.arange(N) < 9,
    "padding anywhere": np.arange(N) % 3 != 1,
    "a chunk of padding": np.arange(N) // 4 != 1,
}
HEADS = ("untied", "tied", "untied, quantized", "tied, quantized")

Head = Callable[[mx.array], mx.array]


def model_of(head: str) -> CausalLM:
    model = CausalLM(replace(SPEC, hidden_size=D, tie_word_embeddings=head.startswith("tied")))
    name = "model.embed_tokens" if head.startswith("tied") else "lm_head"
    weight_VD = mx.array(random_array("head", (V, D), 0.5)).astype(mx.bfloat16).astype(mx.float32)
    model.load_weights([(f"{name}.weight", weight_VD)], strict=False)
    if head.endswith("quantized"):
        packed = mx.quantize(weight_VD, group_size=32, bits=8)
        quantize_modules(model, {name: Quantization(32, 8)})
        kinds = ("weight", "scales", "biases")
        model.load_weights([(f"{name}.{k}", a) for k, a in zip(kinds, packed, strict=True)], strict=False)
    return model


def in_type(model: CausalLM, dtype: mx.Dtype) -> CausalLM:
    """The same with plain weights of this type."""
    dequantize(model)
    model.update(tree_map(lambda array: array.astype(dtype), model.parameters()))
    return model


def given(dtype: mx.Dtype, mask_N: np.ndarray) -> tuple[mx.array, mx.array, mx.array]:
    """x_ND of numbers that bfloat16 holds, targets_N, mask_N."""
    x_ND = mx.array(random_array("x", (N, D), 1.0)).astype(mx.bfloat16).astype(dtype)
    return x_ND, mx.array(np.random.default_rng(5).integers(0, V, N)), mx.array(mask_N)


def in_chunks(head: Head, x_ND: mx.array, targets_N: mx.array, mask_N: mx.array) -> tuple[mx.array, mx.array]:
    return head_nats(head, V, x_ND, targets_N, mask_N)


def at_once(head: Head, x_ND: mx.array, targets_N: mx.array, mask_N: mx.array) -> tuple[mx.array, mx.array]:
    return next_token_nats(head(x_ND)[None], targets_N[None], mask_N[None])


def results(
    nats_of: Callable, head: Head, arrays: tuple[mx.array, mx.array, mx.array], compiled: bool = False
) -> Arrays:
    """The nats, their number, and the gradient by x of UPSTREAM times the nats."""

    def run(x_ND: mx.array, targets_N: mx.array, mask_N: mx.array) -> Any:
        def weighed(x_ND: mx.array) -> tuple[mx.array, tuple]:
            nats, num_targets = nats_of(head, x_ND, targets_N, mask_N)
            return UPSTREAM * nats, (nats, num_targets)

        (_, sums), dx_ND = mx.value_and_grad(weighed)(x_ND)
        return *sums, dx_ND

    found = (mx.compile(run) if compiled else run)(*arrays)
    assert found[2].dtype == arrays[0].dtype
    return {
        name: np.array(array.astype(mx.float32) if array.itemsize < 4 else array)
        for name, array in zip(("nats", "number of targets", "dx"), found, strict=True)
    }


def oracle(head: str, mask_N: np.ndarray, dtype: mx.Dtype) -> Arrays:
    with in_place_of_production():
        return results(at_once, in_type(model_of(head), dtype).head, given(dtype, mask_N))


@pytest.fixture(params=CHUNKS)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many positions at a time."""
    monkeypatch.setattr(head_module, "CHUNK_LOGITS", request.param * V + V // 2)
    return int(request.param)


every_mask = pytest.mark.parametrize("mask", MASKS)


@every_mask
@pytest.mark.parametrize("head", ["untied", "tied"])
def test_in_float64_chunks_equal_the_whole(head: str, mask: str, chunk: int) -> None:
    ours = results(in_chunks, in_type(model_of(head), mx.float64).head, given(mx.float64, MASKS[mask]))
    ref64 = oracle(head, MASKS[mask], mx.float64)
    require_same_names(mask, ours, ref64)
    require(mask, [within_exact(name, ours[name], ref64[name]) for name in ref64])


@every_mask
@pytest.mark.parametrize("head", HEADS)
def test_in_float32_chunks_equal_the_whole_within_rounding(head: str, mask: str, chunk: int) -> None:
    ours = results(in_chunks, model_of(head).head, given(mx.float32, MASKS[mask]))
    ref32, ref64 = (oracle(head, MASKS[mask], dtype) for dtype in (mx.float32, mx.float64))
    require_same_names(mask, ours, ref64)
    require(mask, [compare(name, ours[name], ref32[name], ref64[name], V) for name in ref64])


@pytest.mark.parametrize("head", ["untied", "tied"])
def test_in_bfloat16_chunks_equal_the_whole_within_rounding(head: str, chunk: int) -> None:
    mask_N = MASKS["padding anywhere"]
    ours = results(in_chunks, in_type(model_of(head), mx.bfloat16).head, given(mx.bfloat16, mask_N))
    ref64 = oracle(head, mask_N, mx.float64)
    require(head, [within_bfloat16(name, ours[name], ref64[name], V) for name in ref64])


@pytest.mark.parametrize("head", HEADS)
def test_compiled_chunks_equal_the_whole_within_rounding(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK_LOGITS", 5 * V)
    arrays = given(mx.float32, MASKS["padding anywhere"])
    ours = results(in_chunks, model_of(head).head, arrays, compiled=True)
    ref32, ref64 = (oracle(head, MASKS["padding anywhere"], dtype) for dtype in (mx.float32, mx.float64))
    require(head, [compare(name, ours[name], ref32[name], ref64[name], V) for name in ref64])


def test_without_a_target_there_are_no_nats_and_no_gradient(chunk: int) -> None:
    found = results(in_chunks, model_of("untied").head, given(mx.float32, np.zeros(N, bool)))
    assert not any(array.any() for array in found.values())


def test_a_logit_of_thousands_leaves_loss_and_gradient_finite(chunk: int) -> None:
    """A certain and right prediction costs nothing; a certain and wrong one costs thousands of nats."""
    logits_NV = 5000.0 * (mx.arange(V) == 7) + mx.zeros((N, V))
    targets_N = mx.array([7] * (N - 1) + [8])
    nats, dx_NV = mx.value_and_grad(
        lambda x: head_nats(lambda y: y, V, x, targets_N, mx.ones(N, mx.bool_))[0]
    )(logits_NV)
    assert nats.item() == 5000.0
    assert np.array_equal(np.flatnonzero(np.array(dx_NV)), [(N - 1) * V + 7, (N - 1) * V + 8])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_two_chunks_of_logits_are_never_in_memory_together(
    monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    """Eight chunks need what one needs, and beside it x, its gradient and its chunks, each of N D numbers.

    And one array of logits: MLX gives memory to a chunk's first operations while the last of the chunk before
    are still computed. All eight together would be seven such arrays and more.
    """
    width, vocab_size, chunk = 16, 4096, 64
    monkeypatch.setattr(head_module, "CHUNK_LOGITS", chunk * vocab_size)
    weight_VD = mx.array(random_array("wide head", (vocab_size, width), 0.1))

    def peak(num_chunks: int) -> int:
        num = num_chunks * chunk
        x_ND = mx.array(random_array("many", (num, width), 1.0))
        targets_N, mask_N = mx.arange(num), mx.ones(num, mx.bool_)
        mx.eval(weight_VD, x_ND, targets_N, mask_N)

        def nats(x_ND: mx.array) -> mx.array:
            return head_nats(lambda x: x @ weight_VD.T, vocab_size, x_ND, targets_N, mask_N)[0]

        run = mx.value_and_grad(nats)
        return peak_bytes(mx.compile(run) if compiled else run, x_ND)

    more_positions, logits = 7 * chunk, 4 * chunk * vocab_size
    assert peak(8) - peak(1) <= 3 * 4 * more_positions * width + logits


@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("path", ["plain", "fast"])
def test_the_loss_over_a_real_vocabulary_loses_no_digits(path: str, spread: float) -> None:
    """Summed in pieces, 49,152 positive terms cost a few roundings of the result.

    `mx.logsumexp` adds them one after another in float32, which costs 5 times this tolerance on a CPU.
    """
    rng = np.random.default_rng(7)
    logits_BTV = (spread * rng.standard_normal((2, 8, 49_152))).astype(np.float32)
    targets_BT, mask_BT = rng.integers(0, 49_152, (2, 8)), np.ones((2, 8), dtype=bool)
    logits, targets, mask = mx.array(logits_BTV), mx.array(targets_BT), mx.array(mask_BT)
    if path == "plain":
        nats, _ = next_token_nats(logits, targets, mask)
    else:
        flat = (logits.flatten(0, 1), targets.flatten(), mask.flatten())
        nats, _ = head_nats(lambda x_NV: x_NV, 49_152, *flat)
    double_BTV = logits_BTV.astype(np.float64)
    chosen_BT = np.take_along_axis(double_BTV, targets_BT[..., None], -1).squeeze(-1)
    exact = (np.log(np.exp(double_BTV).sum(-1)) - chosen_BT).sum()
    require("loss", [within("nats", np.array(nats), np.array(exact), 0.0, 2)])


def test_the_loss_of_a_model_holds_no_more_logits_than_a_chunk_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `LoRATrainer` calls it, with more words than features and with more features than words."""
    held: list[int] = []

    def noting(logits_NV: mx.array, *rest: mx.array) -> tuple[mx.array, mx.array]:
        held.append(logits_NV.size)
        return cross_entropy(logits_NV, *rest)

    cross_entropy = ops.cross_entropy
    monkeypatch.setattr(ops, "cross_entropy", noting)
    monkeypatch.setattr(head_module, "CHUNK_LOGITS", 4 * SPEC.vocab_size)
    for vocab_size in (SPEC.vocab_size, SPEC.hidden_size // 2):
        model = CausalLM(replace(SPEC, vocab_size=vocab_size))
        tokens_BT = np.arange(26).reshape(2, 13) % vocab_size
        batch = Batch(tokens_BT, tokens_BT, np.ones((2, 13), bool), 26)
        mx.eval(FAST.batch_loss(model, FAST.to_arrays(batch)))
    assert max(held) <= 4 * SPEC.vocab_size < 26 * SPEC.vocab_size


def num_products(model: CausalLM, x_ND: mx.array, targets_N: mx.array) -> int:
    """Matrix multiplications in the graph of the loss alone."""
    nats, _ = head_nats(head_module.head_of(model, x_ND), V, x_ND, targets_N, mx.ones(len(x_ND), mx.bool_))
    graph = io.StringIO()
    mx.export_to_dot(graph, nats=nats)
    return graph.getvalue().count('"Matmul"')


def test_an_evaluation_forms_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four chunks it has four times the products of one. In training a chunk waits for a gradient."""
    monkeypatch.setattr(head_module, "CHUNK_LOGITS", 4 * V)
    model, x_ND, targets_N = model_of("untied"), mx.random.normal((16, D)), mx.arange(16)
    model.eval()
    of_one, of_four = num_products(model, x_ND[:4], targets_N[:4]), num_products(model, x_ND, targets_N)
    assert of_four == 4 * of_one > 0
    model.train()
    assert num_products(model, x_ND, targets_N) > of_four


def test_a_loss_in_evaluation_has_a_gradient_all_the_same() -> None:
    model, x_ND, targets_N = model_of("tied"), mx.random.normal((N, D)), mx.arange(N)

    def gradient(is_training: bool) -> mx.array:
        model.train(is_training)
        mask_N = mx.ones(N, mx.bool_)
        return mx.grad(lambda x: head_nats(head_module.head_of(model, x), V, x, targets_N, mask_N)[0])(x_ND)

    assert mx.allclose(gradient(False), gradient(True), rtol=1e-4, atol=1e-6)
