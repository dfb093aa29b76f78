"""Small random models, adapters and batches, and the reference on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

import reference.data
from mlx_impl.config import LoRAConfig, ModelConfig, RopeScaling
from mlx_impl.data import Batch, Example, make_batch
from reference.lora import LoRALinear, add_lora
from reference.model import CausalLM, load_arrays
from reference.train import batch_loss
from tests.tiny_model import TINY_LLAMA

Arrays = dict[str, np.ndarray]

LLAMA = TINY_LLAMA
LINEAR = RopeScaling("linear", 4.0)
# With this short original context, of five frequencies one is kept, one is blended, three are divided.
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, original_max_position_embeddings=40)

MODELS = {
    "untied": LLAMA,
    "tied": replace(LLAMA, tie_word_embeddings=True),
    "as-many-kv-heads-as-heads": replace(LLAMA, num_key_value_heads=6),
    "one-kv-head": replace(LLAMA, num_key_value_heads=1),
    "odd-width": replace(
        LLAMA, hidden_size=27, intermediate_size=45, num_attention_heads=3, num_key_value_heads=1, head_dim=6
    ),
    "rope-linear": replace(LLAMA, rope_scaling=LINEAR),
    "rope-llama3": replace(LLAMA, rope_scaling=LLAMA3),
    "mistral": replace(LLAMA, sliding_window=4),
    "qwen2": replace(LLAMA, hidden_size=60, qkv_bias=True),
    "qwen3": replace(LLAMA, qk_norm=True),
    "qwen3-tied-rope-linear": replace(LLAMA, qk_norm=True, tie_word_embeddings=True, rope_scaling=LINEAR),
}

PLAIN = LoRAConfig(rank=3, alpha=7.0)
ADAPTERS = {
    "lora": PLAIN,
    "rslora": replace(PLAIN, use_rslora=True),
    "dora": replace(PLAIN, use_dora=True),
    "dora-rslora": replace(PLAIN, use_dora=True, use_rslora=True),
    "patterns": replace(
        PLAIN,
        rank_pattern={"q_proj": 5, "layers.1.mlp.down_proj": 2, r".*\.0\..*up_proj": 1},
        alpha_pattern={"mlp.down_proj": 11.0, "q_proj": 0.5},
    ),
    "patterns-rslora": replace(
        PLAIN, use_rslora=True, rank_pattern={"v_proj": 4}, alpha_pattern={"v_proj": 9.0}
    ),
    "two-suffixes": replace(PLAIN, target_modules=("q_proj", "mlp.down_proj")),
    "part-of-a-name": replace(PLAIN, target_modules=("1.self_attn.v_proj", "up_proj", "k_proj")),
    "regular-expression": replace(PLAIN, target_modules=r"model\.layers\.[02]\..*(q|down)_proj"),
    "all-linear": replace(PLAIN, target_modules="all-linear"),
    "last-2-blocks": replace(PLAIN, num_layers=2),
    "last-block-one-suffix": replace(PLAIN, num_layers=1, target_modules=("o_proj",)),
}

TOKEN_COUNTS = (14, 6, 11)  # rows of unequal length
PROMPT_COUNTS = (5, 3, 9)  # tokens of each row that are the prompt


def random_arrays(shapes: dict[str, tuple[int, ...]], scale: float, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {n: (rng.standard_normal(s) * scale).astype(np.float32) for n, s in sorted(shapes.items())}


def random_weights(spec: ModelConfig) -> Arrays:
    shapes = {n: tuple(p.shape) for n, p in CausalLM(spec).named_parameters()}
    weights = random_arrays(shapes, 0.3, seed=1)
    return weights | {n: 1 + w for n, w in weights.items() if "norm" in n}


def random_factors(spec: ModelConfig, lora: LoRAConfig) -> Arrays:
    """Random factors. B is not zero, so that A's gradients are not zero; magnitudes are positive."""
    model = CausalLM(spec)
    add_lora(model, lora)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    factors = random_arrays(shapes, 0.2, seed=2)
    return factors | {n: 1.5 + f for n, f in factors.items() if n.endswith("magnitude")}


def random_batch(
    spec: ModelConfig,
    seed: int = 3,
    token_counts: Sequence[int] = TOKEN_COUNTS,
    prompt_counts: Sequence[int] = PROMPT_COUNTS,
) -> Batch:
    rng = np.random.default_rng(seed)
    counts = zip(token_counts, prompt_counts, strict=True)
    return make_batch(
        [
            Example(tuple(rng.integers(1, spec.vocab_size, n).tolist()), (False,) * p + (True,) * (n - p))
            for n, p in counts
        ]
    )


def longest_sum(spec: ModelConfig, batch: Batch) -> int:
    """The longest sum in forward and backward: over the vocabulary, a layer's width, or the batch."""
    sizes = (spec.vocab_size, spec.intermediate_size, spec.num_attention_heads * spec.head_dim)
    return max(*sizes, batch.inputs_BT.size)


def to_tensors(batch: Batch) -> reference.data.Batch:
    inputs, targets = (torch.tensor(a, dtype=torch.long) for a in (batch.inputs_BT, batch.targets_BT))
    return reference.data.Batch(inputs, targets, torch.tensor(batch.mask_BT))


class Oracle:
    """The reference, in float32 or float64, with arrays by name."""

    def __init__(
        self,
        spec: ModelConfig,
        weights: Arrays,
        lora: LoRAConfig,
        factors: Arrays,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.model = CausalLM(spec).to(dtype)
        load_arrays(self.model, weights)
        self.names = add_lora(self.model, lora)
        known = self.model.state_dict()
        self.model.load_state_dict(known | {n: torch.tensor(f) for n, f in factors.items()})

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        self.model.eval()
        with torch.no_grad():
            return self.model(torch.tensor(tokens_BT, dtype=torch.long)).numpy()

    def gradients(self, batch: Batch) -> Arrays:
        self.model.zero_grad()
        nats, num_targets = batch_loss(self.model, to_tensors(batch))
        (nats / num_targets).backward()
        named = self.model.named_parameters()
        return {n: p.grad.numpy().copy() for n, p in named if p.grad is not None}

    def scales(self) -> dict[str, float]:
        modules = self.model.named_modules()
        return {name: module.scale for name, module in modules if isinstance(module, LoRALinear)}

    def factors(self) -> Arrays:
        named = self.model.named_parameters()
        return {n: p.detach().numpy().copy() for n, p in named if p.requires_grad}
