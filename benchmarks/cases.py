"""The cases: a model, its batches and the training settings. Every trainer gets the same arrays.

The real case is SmolLM2-135M-Instruct on the geography questions, read by mlx_impl's own loader and
tokenizer. The others have random weights and random tokens; their rows begin with the prompt and end with
the targets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mlx_impl.config import LoRAConfig, ModelConfig, TrainConfig

GROUP_SIZE = 32  # of quantized weights
GEOGRAPHY = Path(__file__).resolve().parents[1] / "fixtures" / "geography" / "train.jsonl"

TINYLLAMA = ModelConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=False,
)
SMALL = replace(
    TINYLLAMA,
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TINY = replace(
    TINYLLAMA,
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
)


@dataclass(frozen=True)
class Case:
    name: str
    model: ModelConfig | None  # None: SmolLM2-135M-Instruct and the geography questions
    batch_size: int = 4
    tokens: int = 0  # inputs per row; unused for the geography questions
    lengths: tuple[int, int] | None = None  # an epoch of examples of these inputs instead, from and to
    batching: str = "plain"  # of that epoch; rows of at most `tokens` where packed
    target_share: float = 1.0  # of the positions of a row
    rank: int = 8
    dropout: float = 0.0
    use_dora: bool = False
    bits: int = 0  # of quantized weights, in groups of GROUP_SIZE; 0: in `dtype`
    dtype: str = "float32"  # of the frozen weights
    checkpointed: bool = False
    micro_batches: int = 1  # per update
    num_windows: int = 1  # different updates, repeated in a cycle
    needs_gpu: bool = False

    @property
    def lora(self) -> LoRAConfig:
        return LoRAConfig(rank=self.rank, alpha=2.0 * self.rank, dropout=self.dropout, use_dora=self.use_dora)

    @property
    def training(self) -> TrainConfig:
        return TrainConfig(
            iters=10**9,
            batch_size=self.batch_size,
            batching=self.batching,
            max_seq_length=self.tokens or 2048,
            grad_accumulation_steps=self.micro_batches,
            learning_rate=1e-4,
            grad_checkpoint=self.checkpointed,
        )


on_a_gpu = partial(Case, model=TINYLLAMA, dtype="bfloat16", needs_gpu=True)

CASES = {
    case.name: case
    for case in (
        Case("smollm2", None, num_windows=5),
        Case("smollm2-dropout", None, num_windows=5, dropout=0.1),
        Case("smollm2-dora", None, num_windows=5, use_dora=True),
        Case("small", SMALL, tokens=128, target_share=0.25),
        Case("tiny", TINY, tokens=32, target_share=0.5),
        on_a_gpu("tinyllama", tokens=1024),
        on_a_gpu("tinyllama-16", batch_size=16, tokens=1024),
        on_a_gpu("tinyllama-25", tokens=1024, target_share=0.25),
        on_a_gpu("tinyllama-ckpt", tokens=1024, checkpointed=True),
        on_a_gpu("tinyllama-8192", batch_size=1, tokens=8192),
        on_a_gpu("tinyllama-16384-ckpt", batch_size=1, tokens=16384, checkpointed=True),
        on_a_gpu("tinyllama-32768-ckpt", batch_size=1, tokens=32768, checkpointed=True),
        on_a_gpu("tinyllama-4-bits", batch_size=8, tokens=256, bits=4),
        on_a_gpu("tinyllama-4-bits-8192", batch_size=1, tokens=8192, bits=4),
        on_a_gpu("tinyllama-4-bits-8192-ckpt", batch_size=1, tokens=8192, bits=4, checkpointed=True),
    )
}


def named_case(name: str) -> Case:
    if name not in CASES:
        raise ValueError(f"a case must be one of {', '.join(CASES)}, got {name!r}")
    return CASES[name]
