"""The three flat records that describe a run: the model, the adapter, the training.

Data only, no framework: `reference/` reads this file and nothing else of `mlx_impl`.
Field names are Hugging Face's `config.json` and PEFT's `adapter_config.json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_type_hints

# The seven linear layers of a Llama block, in the order in which a token meets them.
BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family. The letters are those of the shape names."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # G: each serves H / G query heads
    head_dim: int  # K
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool  # the head is the embedding, transposed

    def __post_init__(self) -> None:
        require_numbers(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads, "
                f"got {self.num_attention_heads} and {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (rope turns pairs), got {self.head_dim}")


@dataclass(frozen=True)
class LoRAConfig:
    """A low-rank update: y = W x + (alpha / rank) B A x  (Hu et al. 2021, section 4.1)."""

    rank: int = 8  # R
    alpha: float = 16.0
    dropout: float = 0.0  # on the input of A, while training
    target_modules: tuple[str, ...] = BLOCK_LINEARS
    num_layers: int = -1  # the last N blocks; -1 means all

    def __post_init__(self) -> None:
        require_numbers(self, may_be_zero=("dropout",))
        if self.dropout >= 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.num_layers != -1 and self.num_layers < 1:
            raise ValueError(f"num_layers must be -1 (all) or at least 1, got {self.num_layers}")


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast and on what. One iteration is one optimizer update."""

    iters: int
    batch_size: int = 4
    learning_rate: float = 3e-4
    optimizer: str = "adamw"  # or "sgd"
    weight_decay: float = 0.0  # decoupled for adamw, L2 for sgd, as in PyTorch
    seed: int = 0  # initial A, order of the examples, dropout

    def __post_init__(self) -> None:
        require_numbers(self, may_be_zero=("learning_rate", "weight_decay", "seed"))
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer must be adamw or sgd, got {self.optimizer!r}")
        require_seed(self.seed)


def require_numbers(record: object, may_be_zero: tuple[str, ...] = ()) -> None:
    """ValueError unless int fields are at least 1, float fields finite and positive, or 0 where they may."""
    for name, kind in get_type_hints(type(record)).items():
        value = getattr(record, name)
        if kind is bool and not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")
        if kind not in (int, float) or name == "num_layers":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            noun = "a whole number" if kind is int else "a number"
            raise ValueError(f"{name} must be {noun}, got {value!r}")
        if not 0 <= value < float("inf") or (value == 0 and name not in may_be_zero):
            least = "at least 0" if name in may_be_zero else "at least 1" if kind is int else "positive"
            raise ValueError(f"{name} must be {'' if kind is int else 'finite and '}{least}, got {value}")


def require_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be at least 0 and less than 2**63, got {seed}")
