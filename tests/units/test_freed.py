"""What a training held is freed when it is over: the model, its data and what was compiled for them."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import product

import mlx.core as mx
import pytest

from mlx_impl.config import LoRAConfig, TrainConfig
from mlx_impl.data import Example
from mlx_impl.model import CausalLM
from mlx_impl.run.trainer import LoRATrainer
from tests.tiny_model import TINY_LLAMA

pytestmark = pytest.mark.usefixtures("on_the_cpu")

MODEL = replace(TINY_LLAMA, num_hidden_layers=2)
EXAMPLES = [Example(tuple(range(start, start + 9)), (False,) * 4 + (True,) * 5) for start in (1, 20)]


def train(plain: bool, compiled: bool, grad_checkpoint: bool) -> None:
    training = TrainConfig(iters=2, batch_size=2, max_seq_length=16, grad_checkpoint=grad_checkpoint)
    model = CausalLM(MODEL)
    mx.eval(model.parameters())
    for _ in LoRATrainer(model, LoRAConfig(rank=2, dropout=0.1), training, compiled, plain).fit(EXAMPLES):
        pass


@pytest.mark.parametrize(("plain", "compiled", "grad_checkpoint"), [*product([False, True], repeat=3)])
def test_a_training_that_is_over_leaves_no_array_behind(
    plain: bool, compiled: bool, grad_checkpoint: bool
) -> None:
    """A tracer that is kept ties a compiled step to itself, in a cycle that no garbage collector sees."""
    train(plain, compiled, grad_checkpoint)
    before = held_bytes()
    train(plain, compiled, grad_checkpoint)
    assert held_bytes() == before


def held_bytes() -> int:
    """Once MLX's thread has let go of the arrays of its last operation too."""
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory()
