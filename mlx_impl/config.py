"""The three flat records that describe a run: the model, the adapter, the training.

Data only, no framework: `reference/` reads this file and nothing else of `mlx_impl`.
Field names are Hugging Face's `config.json` and PEFT's `adapter_config.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_type_hints

LARGEST_FLOAT32 = 3.4028234e38  # settings become float32 numbers

# The seven linear layers of a Llama block, in the order of the computation.
BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class RopeScaling:
    """How the rotation frequencies of a long-context model are stretched; names as in `config.json`.

    `linear` divides every frequency by `factor`. `llama3` divides those whose wavelength exceeds
    original_max_position_embeddings / low_freq_factor, keeps those below it / high_freq_factor, and blends
    between (Llama 3.1's published rule).
    """

    rope_type: str  # "linear" or "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        require_numbers(self)
        require_choice("rope_type", self.rope_type, ("linear", "llama3"))
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor must be less than high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )


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
    qkv_bias: bool = False  # Qwen2's: of q_proj, k_proj and v_proj
    qk_norm: bool = False  # Qwen3's: an RMSNorm over each head's queries and keys, before rope
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # attention window in tokens, the current one included (Mistral)

    def __post_init__(self) -> None:
        require_numbers(self)
        if self.sliding_window is not None:
            require_number("sliding_window", self.sliding_window, int)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads, "
                f"got {self.num_attention_heads} and {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (rope rotates pairs), got {self.head_dim}")


@dataclass(frozen=True)
class LoRAConfig:
    """A low-rank update: y = x W^T + scale * (x A) B  (Hu et al. 2021, section 4.1).

    Names and rules are PEFT's. The scale is alpha / rank, or with rsLoRA alpha / sqrt(rank) (Kalajdzievski
    2023). DoRA trains direction and length apart (Liu et al. 2024, eq. 5). A pattern is matched against the
    end of a linear's name; the first match decides.
    """

    rank: int = 8  # R
    alpha: float = 16.0
    dropout: float = 0.0  # on the input of A, while training
    # Ends of names; or one string: "all-linear", or a regular expression for the whole name.
    target_modules: tuple[str, ...] | str = BLOCK_LINEARS
    num_layers: int = -1  # the last N blocks; -1 means all
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)  # a rank of its own for some linears
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_numbers(self, may_be_zero=("dropout",))
        if self.dropout >= 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.num_layers != -1 and self.num_layers < 1:
            raise ValueError(f"num_layers must be -1 (all) or at least 1, got {self.num_layers}")
        targets = self.target_modules
        if not isinstance(targets, (str, tuple)) or not all(isinstance(name, str) for name in targets):
            raise ValueError(f"target_modules must be a text or a tuple of texts, got {targets!r}")
        for name, kind in (("rank_pattern", int), ("alpha_pattern", float)):
            patterns = getattr(self, name)
            if not isinstance(patterns, dict):
                raise ValueError(f"{name} must be a dict from patterns to numbers, got {patterns!r}")
            for pattern, value in patterns.items():
                require_number(f"{name}[{pattern!r}]", value, kind)


BATCHINGS = ("plain", "grouped", "packed")


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast and on what. One iteration is one optimizer update."""

    iters: int
    batch_size: int = 4
    batching: str = "plain"  # or "grouped" by length, or "packed": several examples a row
    max_seq_length: int = 2048  # tokens of a packed row
    grad_accumulation_steps: int = 1  # micro-batches an update
    learning_rate: float = 3e-4  # the peak learning rate
    lr_schedule: str = "constant"  # or "linear" or "cosine": down to 0 at the end
    warmup_steps: int = 0  # updates in which the learning rate rises from 0
    loraplus_lr_ratio: float = 1.0  # LoRA+: learning rate of B divided by that of A
    optimizer: str = "adamw"  # or "sgd"
    weight_decay: float = 0.0  # decoupled for adamw, L2 for sgd, as in PyTorch
    max_grad_norm: float = 0.0  # clip the gradients' global norm to this; 0: no clipping
    grad_checkpoint: bool = False  # recompute activations in the backward pass, to save memory
    seed: int = 0  # initial A, dropout
    data_seed: int = 0  # order of the examples

    def __post_init__(self) -> None:
        zero = ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "data_seed")
        require_numbers(self, may_be_zero=zero)
        require_choice("batching", self.batching, BATCHINGS)
        require_choice("optimizer", self.optimizer, ("adamw", "sgd"))
        require_choice("lr_schedule", self.lr_schedule, ("constant", "linear", "cosine"))
        if self.warmup_steps > self.iters:
            raise ValueError(f"warmup_steps must be at most iters, got {self.warmup_steps} and {self.iters}")
        require_number(
            "learning_rate * loraplus_lr_ratio", self.learning_rate * self.loraplus_lr_ratio, float, True
        )
        require_seed("seed", self.seed)
        require_seed("data_seed", self.data_seed)


def require_numbers(record: object, may_be_zero: tuple[str, ...] = ()) -> None:
    """ValueError unless int fields are at least 1 and float fields finite and positive, or 0 if allowed."""
    for name, kind in get_type_hints(type(record)).items():
        value = getattr(record, name)
        if kind is bool and not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")
        if kind in (int, float) and name != "num_layers":
            require_number(name, value, kind, name in may_be_zero)


def require_number(name: str, value: object, kind: type, may_be_zero: bool = False) -> None:
    """ValueError unless it is a whole number, or a number where `kind` is float, and large enough."""
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        noun = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} must be {noun}, got {value!r}")
    if not 0 <= value < float("inf") or (value == 0 and not may_be_zero):  # type: ignore[operator]
        least = "at least 0" if may_be_zero else "at least 1" if kind is int else "positive"
        raise ValueError(f"{name} must be {'' if kind is int else 'finite and '}{least}, got {value}")
    if kind is float and value > LARGEST_FLOAT32:  # type: ignore[operator]
        raise ValueError(f"{name} must be at most {LARGEST_FLOAT32:.2g}, float32's largest, got {value}")


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def require_seed(name: str, seed: int) -> None:
    """ValueError unless it has 32 bits: NumPy would take a longer one for several seeds."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"{name} must be at least 0 and less than 2**32, got {seed}")
