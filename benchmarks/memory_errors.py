"""The estimated need of memory beside the peak of MLX's allocator: `python -m benchmarks.memory_errors`.

A model of eight blocks with random weights takes three updates; all but a shared prompt are targets.
Prints a table: an evaluation and a step of each kind of work, the peak and the error of the estimate.
"""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_impl.config import LoRAConfig, ModelConfig, TrainConfig
from mlx_impl.data import Example, evaluation_batches, training_windows

from .table import markdown, shown_bytes
from .worker import prepare

MODEL = ModelConfig(2048, 192, 512, 8, 6, 2, 32, 1e-5, 1e4, False)
ROWS = (256,) * 4
SHORT = tuple(random.Random(0).choices(range(20, 121), k=24))
CHECKPOINTED = {"grad_checkpoint": True}
PACKED = {"batching": "packed", "max_seq_length": 512, "batch_size": 3}


@dataclass(frozen=True)
class Work:
    """What is trained, and how."""

    lengths: tuple[int, ...] = ROWS
    model: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    bits: int = 0
    dtype: str = "float32"
    shared: int = 0  # tokens at the beginning of each row that are the same in all, and no targets


WORK = {
    "plain": Work(),
    "checkpointed": Work(training=CHECKPOINTED),
    "a prompt of 192 shared": Work(shared=192),
    "4 bits": Work(bits=4),
    "4 bits, checkpointed": Work(bits=4, training=CHECKPOINTED),
    "dropout": Work(lora={"dropout": 0.1}),
    "DoRA": Work(lora={"use_dora": True}),
    "DoRA, checkpointed": Work(lora={"use_dora": True}, training=CHECKPOINTED),
    "DoRA, 4 bits": Work(lora={"use_dora": True}, bits=4),
    "bfloat16": Work(dtype="bfloat16"),
    "packed": Work(SHORT, training=PACKED),
    "packed, checkpointed": Work(SHORT, training=PACKED | CHECKPOINTED),
    "window of 64": Work(model={"sliding_window": 64}),
    "window of 64 as a band": Work((640, 640), {"sliding_window": 64}),
}


def main(names: Sequence[str]) -> None:
    print(prepare({}))
    head = ("work", "evaluation", "error", "step", "error")
    rows = []
    for name in names or WORK:
        rows.append((name, *errors(WORK[name])))
        print(*rows[-1], flush=True)
    print(markdown(head, rows))


def errors(work: Work) -> tuple[str, ...]:
    """Peak and error of an evaluation and of a step."""
    pairs = needs_and_peaks(work)
    return tuple(text for need, peak in pairs for text in (shown_bytes(peak), f"{need / peak - 1:+.1%}"))


def needs_and_peaks(work: Work) -> list[tuple[int, int]]:
    """The estimate in bytes and the peak, of an evaluation and of a step."""
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_impl.fast.memory_model import evaluation_bytes, training_bytes
    from mlx_impl.fast.memory_sizes import shape_of, sizes_of
    from mlx_impl.model import CausalLM
    from mlx_impl.run.trainer import LoRATrainer

    training = TrainConfig(iters=3, **{"batch_size": len(work.lengths), **work.training})
    config = replace(MODEL, **work.model)
    model, examples = CausalLM(config), examples_of(work, config.vocab_size)
    model.set_dtype(getattr(mx, work.dtype))
    if work.bits:
        nn.quantize(model, 32, work.bits)
    mx.eval(model.parameters())
    trainer = LoRATrainer(model, LoRAConfig(**work.lora), training)
    sizes, checkpointed = sizes_of(model), training.grad_checkpoint
    batches = [batch for window in training_windows(examples, training) for batch in window]
    evaluated = evaluation_batches(examples, training.batch_size)
    needs = (
        max(evaluation_bytes(sizes, shape_of(batch)) for batch in evaluated),
        max(training_bytes(sizes, shape_of(batch), checkpointed) for batch in batches),
    )
    first = peak_of(lambda: trainer.evaluate(examples))  # before there are moments
    step = peak_of(lambda: list(trainer.fit(examples)))
    peaks = max(first, peak_of(lambda: trainer.evaluate(examples))), step
    return list(zip(needs, peaks, strict=True))


def examples_of(work: Work, vocab_size: int) -> list[Example]:
    draw, prompt = random.Random(0), random.Random(1).choices(range(vocab_size), k=work.shared)
    tokens = [[*prompt, *draw.choices(range(vocab_size), k=n - work.shared)] for n in work.lengths]
    return [Example(tuple(row), tuple(i >= work.shared for i in range(len(row)))) for row in tokens]


def peak_of(run: Callable[[], object]) -> int:
    import mlx.core as mx

    gc.collect()
    mx.synchronize()
    mx.reset_peak_memory()
    run()
    return mx.get_peak_memory()


if __name__ == "__main__":
    main(sys.argv[1:])
