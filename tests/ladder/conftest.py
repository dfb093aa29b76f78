"""The case on which every rung is judged: a tiny Llama whose sizes all differ, lest two be confused."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from mlx_impl.config import LoRAConfig, ModelConfig
from mlx_impl.data import Batch, Example, make_batch
from reference.lora import add_lora
from reference.model import CausalLM
from tests.trainers.mlx_impl import MlxTrainer
from tests.trainers.reference import ReferenceTrainer

# kv heads < heads, heads * head_dim != width, a prime vocabulary, no layer square, alpha != rank.
SPEC = ModelConfig(
    vocab_size=61,
    hidden_size=28,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    rms_norm_eps=1e-5,
    rope_theta=1000.0,
    tie_word_embeddings=False,
)
LORA = LoRAConfig(rank=3, alpha=7.0)
TOKEN_COUNTS = (14, 6, 11)  # rows of unequal length
PROMPT_COUNTS = (5, 3, 9)  # of which so many are the prompt


def random_arrays(shapes: dict[str, tuple[int, ...]], scale: float, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) * scale).astype(np.float32)
        for name, shape in sorted(shapes.items())
    }


@dataclass(frozen=True)
class Case:
    """A model, an adapter with B != 0, a batch; and the three trainers that are given them."""

    spec: ModelConfig
    weights: dict[str, np.ndarray]
    factors: dict[str, np.ndarray]
    batch: Batch
    longest_sum: int

    def ours(self) -> MlxTrainer:
        return MlxTrainer(self.spec, self.weights, LORA, self.factors)

    def reference(self, dtype: torch.dtype = torch.float64) -> ReferenceTrainer:
        return ReferenceTrainer(self.spec, self.weights, LORA, self.factors, dtype)

    def with_zero_b(self) -> Case:
        factors = {n: v * (not n.endswith("lora_b")) for n, v in self.factors.items()}
        return replace(self, factors=factors)


def make_case(spec: ModelConfig) -> Case:
    model = CausalLM(spec)
    weights = random_arrays({n: tuple(p.shape) for n, p in model.named_parameters()}, 0.3, seed=1)
    weights |= {n: 1 + w for n, w in weights.items() if "norm" in n}
    names = add_lora(model, LORA)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert len(shapes) == 2 * len(names)
    rng = np.random.default_rng(3)
    examples = [
        Example(tuple(rng.integers(1, spec.vocab_size, n).tolist()), (False,) * p + (True,) * (n - p))
        for n, p in zip(TOKEN_COUNTS, PROMPT_COUNTS, strict=True)
    ]
    batch = make_batch(examples)
    sizes = (spec.vocab_size, spec.intermediate_size, spec.num_attention_heads * spec.head_dim)
    longest_sum = max(*sizes, batch.inputs_BT.size)
    return Case(spec, weights, random_arrays(shapes, 0.2, seed=2), batch, longest_sum)


@pytest.fixture(params=["untied", "tied"], scope="session")
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(replace(SPEC, tie_word_embeddings=request.param == "tied"))
