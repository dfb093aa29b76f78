"""The same program twice gives the same bits, on the device that trains; and where it does not, by how much.

A sum in random order changes bits from run to run. On a CPU there is none. On a GPU MLX adds up the gradient
of a gather by atomics, so an index that repeats is such a sum, and cuDNN's attention in bfloat16 has another
one in its backward pass. `unpadding.py` avoids the first; the second is only measured.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_impl.config import LoRAConfig, ModelConfig, TrainConfig
from mlx_impl.data import Batch
from mlx_impl.fast.forward import FAST
from mlx_impl.fast.kept_positions import kept_positions
from mlx_impl.fast.vectors import VectorOptimizer, as_factors, as_vectors
from mlx_impl.lora import add_lora
from mlx_impl.model import CausalLM
from mlx_impl.train import train
from tests.lora_ladder.cases import SPEC, make_batch, random_array, random_rows
from tests.lora_ladder.protocol import Arrays
from tests.nightly import mostly_at_night

# A width of heads that cuDNN takes.
WIDE = replace(SPEC, hidden_size=64, num_attention_heads=4, head_dim=16)
B16, F32 = mx.bfloat16, mx.float32
CUDNN_TILE = 128  # MLX has cuDNN's backward pass for multiples of so many positions


def shared_batch(num_tokens: int) -> Batch:
    """Four rows that begin alike, for a while even with targets."""
    rows = random_rows(SPEC.vocab_size, [num_tokens + 1] * 4)
    num_shared = 3 * num_tokens // 4
    return make_batch([rows[0][:num_shared] + row[num_shared:] for row in rows], [num_shared // 2] * 4)


def plain_batch(num_tokens: int) -> Batch:
    rows = random_rows(SPEC.vocab_size, (num_tokens + 1, num_tokens - 3, num_tokens // 2, 5))
    return make_batch(rows, (2, num_tokens // 2, 1, 3))


BATCHES = {"rows of a prompt": shared_batch, "plain rows": plain_batch}


def model_of(spec: ModelConfig, dtype: mx.Dtype, use_dora: bool = False) -> CausalLM:
    mx.random.seed(1)
    model = CausalLM(spec)
    model.set_dtype(dtype)
    add_lora(model, LoRAConfig(rank=3, alpha=6.0, dropout=0.25, use_dora=use_dora))
    factors = [
        (n, mx.array(random_array(n, a.shape, 0.2))) for n, a in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(factors, strict=False)
    return model


def run(dtype: mx.Dtype, batch: Batch, compiled: bool) -> Arrays:
    """Losses and factors of four updates."""
    model, training = model_of(WIDE, dtype), TrainConfig(iters=4, learning_rate=2.0**-6)
    windows, optimizer = [[batch]] * 4, VectorOptimizer(training)
    records = list(train(model, optimizer, windows, training, compiled=compiled, loss=FAST))
    factors = {name: np.array(value) for name, value in tree_flatten(model.trainable_parameters())}
    return {"losses": np.array([record.loss_nats for record in records]), **factors}


@pytest.mark.parametrize(
    ("dtype", "compiled"),
    # bfloat16 compiles for half a minute, once on a machine
    mostly_at_night([(B16, False), (F32, True), (F32, False), (B16, True)], 2),
)
@pytest.mark.parametrize("kind", BATCHES)
def test_five_runs_of_one_seed_end_with_the_same_bits(dtype: mx.Dtype, kind: str, compiled: bool) -> None:
    """At a width that cuDNN does not take."""
    batch = BATCHES[kind](CUDNN_TILE // 2)
    first, *others = (run(dtype, batch, compiled) for _ in range(5))
    assert all(np.array_equal(other[name], first[name]) for other in others for name in first)


def gradients(model: CausalLM, batch: Batch) -> Arrays:
    model.eval()
    _, found = nn.value_and_grad(model, FAST.batch_loss)(model, FAST.to_arrays(batch))
    return {name: np.array(value.astype(mx.float32)) for name, value in tree_flatten(found)}


@pytest.mark.parametrize("kind", BATCHES)
def test_gradients_of_one_batch_have_the_same_bits_a_hundred_times(kind: str) -> None:
    model, batch = model_of(SPEC, mx.float32), BATCHES[kind](24)
    first = gradients(model, batch)
    for _ in range(99):
        again = gradients(model, batch)
        assert all(np.array_equal(again[name], first[name]) for name in first)


def test_rows_of_a_prompt_share_positions_that_are_targets() -> None:
    """Else the claims above would be about less than they say."""
    kept = kept_positions(shared_batch(24))
    assert kept is not None and kept.is_shared_U is not None and shared_batch(24).mask_BT[:, :18].any()


def test_with_cudnns_attention_two_runs_differ_by_less_than_bfloat16_costs() -> None:
    """On CUDA, at a multiple of 128 positions; elsewhere not a bit differs."""
    batch = plain_batch(CUDNN_TILE)
    model = model_of(WIDE, mx.bfloat16)
    one, other = (gradients(model, batch) for _ in range(2))
    if not mx.cuda.is_available() or mx.default_device() != mx.gpu:
        assert all(np.array_equal(other[name], one[name]) for name in one)
    model.set_dtype(mx.float32)  # the same numbers
    exact = gradients(model, batch)
    apart, cost = (np.sqrt(sum(np.sum(np.square(x[n] - one[n])) for n in one)) for x in (other, exact))
    assert apart < cost


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("is_training", [False, True], ids=["evaluation", "dropout"])
def test_factors_loaded_or_updated_give_the_same_bits(use_dora: bool, is_training: bool) -> None:
    """A loaded factor is a row-major array; an updated one is a slice of a vector, A stored transposed."""
    model, batch = model_of(SPEC, mx.float32, use_dora), plain_batch(24)
    model.train(is_training)

    def found() -> Arrays:
        mx.random.seed(5)
        (nats, _), grads = nn.value_and_grad(model, FAST.batch_loss)(model, FAST.to_arrays(batch))
        return {"nats": np.array(nats), **{name: np.array(grad) for name, grad in tree_flatten(grads)}}

    loaded, factors = found(), model.trainable_parameters()
    model.update(as_factors(as_vectors(factors), factors))
    updated = found()
    assert all(np.array_equal(updated[name], loaded[name]) for name in loaded)
