"""In bfloat16 a model is bfloat16 throughout, what trains is float32, and its gradients are PyTorch's.

One float32 constant on the way (a mask, an angle, a scale, a magnitude) would make all that follows float32,
right and at twice the cost. So the type of every module's output is tested, in both paths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_unflatten

from mlx_impl import ops
from mlx_impl.config import TrainConfig
from mlx_impl.data import Batch, Example, make_batch, make_packed_batch
from mlx_impl.fast import forward, reading
from mlx_impl.fast.decode import generate_all
from mlx_impl.fast.forward import FAST
from mlx_impl.fast.vectors import VectorOptimizer
from mlx_impl.generate import KeyValueCache
from mlx_impl.lora import DoRALinear, Dropout, LoRALinear, lora_parameters
from mlx_impl.model import Attention, Block, CausalLM, Decoder, FeedForward, RMSNorm
from mlx_impl.optim import LoRAOptimizer
from mlx_impl.run.merging import merge
from mlx_impl.run.sampling import Sampling
from mlx_impl.train import PLAIN, Loss, train
from tests.derived import Divergence, require, require_same_names, within_bfloat16
from tests.lora_ladder.cases import ARCHITECTURES, BIASED_DORA, SPEC, Case, copies, named_case, random_rows
from tests.lora_ladder.protocol import Arrays, Dialect
from tests.trainers.mlx_impl import MlxTrainer
from tests.trainers.reference import oracle

KINDS = (Decoder, Block, Attention, FeedForward, RMSNorm, LoRALinear, DoRALinear, Dropout, nn.Linear)
CASES = [*ARCHITECTURES, "rslora", "dora", BIASED_DORA]
REFERENCE = oracle(Dialect(), torch.float64)
PATHS = {"fast": FAST, "plain": PLAIN}
FAST_STEPS = ("block", "attention", "project", "project_gated")  # what `fast.forward` computes by functions
MODULES = {"Block", "Attention", "FeedForward", "RMSNorm"}
RANDOM = np.random.default_rng(4)
EXAMPLES = [
    Example(tuple(RANDOM.integers(1, SPEC.vocab_size, n).tolist()), (False,) * p + (True,) * (n - p))
    for n, p in ((9, 4), (3, 1), (12, 11), (5, 0), (2, 1), (7, 3))
]
PACKED = [(0, 1, 4), (5, 3), (2,)]  # rows of 8 + 2 + 1, 6 + 4 and 11 inputs
fast_and_plain = pytest.mark.parametrize("path", PATHS)


def rounded(case: Case) -> Case:
    """With base weights that bfloat16 holds, so that only the computation differs from the reference's."""
    weights = {
        n: np.array(mx.array(w).astype(mx.bfloat16).astype(mx.float32)) for n, w in case.weights.items()
    }
    return replace(case, weights=weights)


def in_bfloat16(case: Case) -> CausalLM:
    """The case's model and adapter: the base in bfloat16, the factors in float32."""
    model = MlxTrainer(case.spec, copies(case.weights), case.lora, copies(case.factors)).model
    frozen = dict(tree_flatten(model.parameters())).keys() - lora_parameters(model).keys()
    base = [(n, a.astype(mx.bfloat16)) for n, a in tree_flatten(model.parameters()) if n in frozen]
    model.load_weights(base, strict=False)
    return model


def numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def bfloat16_case(name: str) -> Case:
    return rounded(named_case(name))


def hold(what: str, ours: Arrays, ref64: Arrays, longest_sum: int) -> None:
    require_same_names(what, ours, ref64)
    verdicts = [within_bfloat16(n, ours[n], ref64[n], longest_sum) for n in ref64]
    worst = require(what, verdicts)
    print(f"{what}: worst of {len(ref64)}: {worst.name} used {worst.used:.0%} of its tolerance")


@pytest.fixture
def computed_in(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, mx.Dtype]]:
    """What was computed while the test ran: the names of modules and functions, and their outputs' types."""
    found: set[tuple[str, mx.Dtype]] = set()

    def noting(real: Callable, name: str) -> Callable:
        def noted(*inputs: Any, **named: Any) -> Any:
            output = real(*inputs, **named)
            arrays = output if isinstance(output, list) else [output]
            found.update((name, array.dtype) for array in arrays)
            return output

        return noted

    for kind in KINDS:
        monkeypatch.setattr(kind, "__call__", noting(kind.__call__, kind.__name__))
    for name in FAST_STEPS:
        monkeypatch.setattr(forward, name, noting(getattr(forward, name), name))
    monkeypatch.setattr(reading, "block", noting(reading.block, "reading.block"))
    return found


def gradients(model: CausalLM, batch: Batch, loss: Loss) -> tuple[mx.array, dict[str, mx.array]]:
    """The mean loss and its gradients, in the mode that the model is in."""
    (nats, num_targets), grads = nn.value_and_grad(model, loss.batch_loss)(model, loss.to_arrays(batch))
    return nats / num_targets, {name: grad / num_targets for name, grad in tree_flatten(grads)}


def train_one(model: CausalLM, case: Case, loss: Loss) -> None:
    gradients(model.train(), case.batch, loss)


def recompute(model: CausalLM, case: Case, loss: Loss) -> None:
    model.model.grad_checkpoint = True
    gradients(model.train(), case.batch, loss)


def train_packed(model: CausalLM, case: Case, loss: Loss) -> None:
    gradients(model.train(), make_packed_batch(EXAMPLES, PACKED), loss)


def decode(model: CausalLM, case: Case) -> None:
    generate_all(model, random_rows(case.spec.vocab_size, (5, 2, 7)), 6, stop_ids=())


def decode_merged(model: CausalLM, case: Case) -> None:
    merge(model)
    decode(model, case)


@fast_and_plain
@pytest.mark.parametrize("act", [train_one, recompute, train_packed])
@pytest.mark.parametrize("name", CASES)
def test_every_hidden_state_is_bfloat16(
    name: str, act: Callable[[CausalLM, Case, Loss], None], path: str, computed_in: set[tuple[str, mx.Dtype]]
) -> None:
    case = bfloat16_case(name).with_dropout(0.2)
    act(in_bfloat16(case), case, PATHS[path])
    computed = {"fast": {"RMSNorm", *FAST_STEPS}, "plain": MODULES}[path]
    assert computed <= {kind for kind, _ in computed_in}
    assert {dtype for _, dtype in computed_in} == {mx.bfloat16}


@pytest.mark.parametrize("act", [decode, decode_merged])
@pytest.mark.parametrize("name", CASES)
def test_every_hidden_state_of_an_answer_is_bfloat16(
    name: str, act: Callable[[CausalLM, Case], None], computed_in: set[tuple[str, mx.Dtype]]
) -> None:
    case = bfloat16_case(name).with_dropout(0.2)
    model = in_bfloat16(case)
    act(model, case)
    assert {kind for kind, _ in computed_in} >= {"RMSNorm", "reading.block"}
    assert {dtype for _, dtype in computed_in} == {mx.bfloat16}
    assert model(mx.array([[1, 2]])).dtype == mx.bfloat16


@pytest.mark.parametrize("module", ["input_layernorm", "self_attn.k_proj.linear", "mlp.down_proj.linear"])
def test_one_float32_weight_is_noticed(module: str, computed_in: set[tuple[str, mx.Dtype]]) -> None:
    """The mutant: all that is computed from it is float32."""
    case = bfloat16_case("untied")
    model = in_bfloat16(case)
    wrong: Any = dict(model.named_modules())[f"model.layers.1.{module}"]
    wrong.weight = wrong.weight.astype(mx.float32)
    decode(model, case)
    assert ("reading.block", mx.float32) in computed_in


@fast_and_plain
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_of_recomputed_blocks_equal_the_reference(name: str, path: str) -> None:
    case = bfloat16_case(name)
    model, exact = in_bfloat16(case).train(), case.build(REFERENCE)
    model.model.grad_checkpoint = True
    loss, grads = gradients(model, case.batch, PATHS[path])
    nats, num_targets = exact.loss(case.batch)
    ref64 = {"loss": np.array(nats / num_targets), **exact.gradients(case.batch)}
    hold(name, {"loss": numpy(loss), **{n: numpy(g) for n, g in grads.items()}}, ref64, case.longest_sum)


@fast_and_plain
@pytest.mark.parametrize("name", ["untied", "sliding window", "qk norm", "dora"])
def test_a_packed_batch_has_the_loss_and_gradients_of_its_examples_unpacked(name: str, path: str) -> None:
    case, packed, plain = bfloat16_case(name), make_packed_batch(EXAMPLES, PACKED), make_batch(EXAMPLES)
    loss, grads = gradients(in_bfloat16(case), packed, PATHS[path])
    exact = case.build(REFERENCE)
    nats, num_targets = exact.loss(plain)
    ref64 = {"loss": np.array(nats / num_targets), **exact.gradients(plain)}
    hold(name, {"loss": numpy(loss), **{n: numpy(g) for n, g in grads.items()}}, ref64, packed.inputs_BT.size)


@fast_and_plain
def test_a_mask_that_leaks_from_one_example_to_the_next_is_noticed(path: str) -> None:
    """The mutant: bfloat16's tolerance is not so wide that it would pass."""
    case, plain = bfloat16_case("untied"), make_batch(EXAMPLES)
    leaking = make_packed_batch(EXAMPLES, PACKED)._replace(segment_BT=None)
    _, grads = gradients(in_bfloat16(case), leaking, PATHS[path])
    ref64 = case.build(REFERENCE).gradients(plain)
    with pytest.raises(Divergence, match="out of tolerance"):
        hold("leaking", {n: numpy(g) for n, g in grads.items()}, ref64, leaking.inputs_BT.size)


@fast_and_plain
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", ["untied", "dora"])
def test_what_trains_is_float32_and_so_are_its_gradients_and_moments(
    name: str, optimizer: str, path: str
) -> None:
    case = bfloat16_case(name)
    model = in_bfloat16(case)
    training = TrainConfig(iters=2, optimizer=optimizer, max_grad_norm=1.0)
    trained = {"fast": VectorOptimizer, "plain": LoRAOptimizer}[path](training)
    records = list(train(model, trained, [[case.batch]] * 2, training, loss=PATHS[path]))
    loss, grads = gradients(model, case.batch, PATHS[path])
    moments = [a for name, a in tree_flatten(trained.state) if name.rpartition(".")[2] in ("m", "v")]
    num_moments = {"adamw": 2, "sgd": 1}[optimizer]
    num_trained = sum(grad.size for grad in grads.values())
    assert sum(moment.size for moment in moments) == num_moments * num_trained and len(records) == 2
    summed = PATHS[path].flatten_grads(tree_unflatten(list(grads.items())))  # over the micro-batches
    for array in (loss, *lora_parameters(model).values(), *(g for _, g in tree_flatten(summed)), *moments):
        assert array.dtype == mx.float32


@pytest.mark.parametrize("name", ["untied", "dora", BIASED_DORA])
def test_merged_logits_are_those_of_the_adapter(name: str) -> None:
    case = bfloat16_case(name)
    model, tokens_BT = in_bfloat16(case), case.batch.inputs_BT
    merge(model)
    ours = numpy(model(mx.array(tokens_BT)))
    hold(name, {"logits": ours}, {"logits": case.build(REFERENCE).logits(tokens_BT)}, case.longest_sum)


@pytest.mark.parametrize("name", ["untied", "qk norm", "sliding window"])
def test_the_cache_holds_bfloat16_and_its_logits_are_those_of_the_whole_text(name: str) -> None:
    case = bfloat16_case(name)
    model, tokens_BT = in_bfloat16(case).eval(), case.batch.inputs_BT
    caches = [KeyValueCache() for _ in model.model.layers]
    columns = [mx.array(tokens_BT[:, [t]]) for t in range(tokens_BT.shape[1])]
    steps = [model.head(model.model(column, caches=caches)) for column in columns]
    ours = numpy(mx.concatenate(steps, axis=1))
    kept = [array for cache in caches for array in (cache.keys_BGSK, cache.values_BGSK) if array is not None]
    assert [array.dtype for array in kept] == [mx.bfloat16] * 2 * case.spec.num_hidden_layers
    hold(name, {"logits": ours}, {"logits": case.build(REFERENCE).logits(tokens_BT)}, case.longest_sum)


@pytest.mark.parametrize(
    "position_of", [lambda first: first, lambda first: mx.arange(first, first + 4)[None]]
)
def test_a_late_token_is_rotated_by_its_own_angle(position_of: Callable[[int], Any]) -> None:
    """bfloat16 has no 1001: above 256 not every whole number is one of its numbers."""
    frequency_P, first = (1.0, 0.3, 0.01), 1000
    x_BHTK = mx.random.normal((1, 2, 4, 6), key=mx.random.key(1)).astype(mx.bfloat16)
    angle_TP = np.arange(first, first + 4)[:, None] * np.array(frequency_P)
    left, right = np.split(numpy(x_BHTK).astype(np.float64), 2, axis=-1)
    cos, sin = np.cos(angle_TP), np.sin(angle_TP)
    expected = np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    hold("rope", {"x": numpy(ops.rope(x_BHTK, frequency_P, position_of(first)))}, {"x": expected}, 2)


def test_the_nucleus_of_bfloat16_logits_is_no_larger() -> None:
    """A running sum in bfloat16 stops growing at 1/4 where each of 1024 tokens adds 1/1024."""
    logits_BV = mx.zeros((20_000, 1024), mx.bfloat16)
    drawn = Sampling(1.0, 0.5)(logits_BV).tolist()
    assert 500 < len(set(drawn)) <= 513
