"""The three flat records that describe a run: the model, the adapter, the training.

Data only, no framework: `reference/` reads this file and nothing else of `mlx_impl`.
Field names are Hugging Face's `config.json` and PEFT's `adapter_config.json`.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
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
        for name in ("iters", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)}")
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer must be adamw or sgd, got {self.optimizer!r}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
