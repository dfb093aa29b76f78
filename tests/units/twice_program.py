"""What each rank of `test_ranks.py` runs to train twice: Ctrl-C ends the first training, and it trains again.

`python -m tests.units.twice_program MOMENT`: Ctrl-C comes to rank 1 alone, in the loop (`loop`) or within an
update (`update`); it prints after which update each training ended, and the adapter's digest.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import mlx.core as mx

from mlx_impl.model import CausalLM
from mlx_impl.run.ranks import Ranks, join_ranks
from mlx_impl.run.trainer import LoRATrainer
from tests.tiny_model import TINY_LLAMA
from tests.units.rank_program import LORA, TRAINING, digest_of, examples


def train(ranks: Ranks, moment: str | None) -> None:
    mx.random.seed(2)
    trainer = LoRATrainer(CausalLM(TINY_LLAMA), LORA, TRAINING, ranks=ranks)
    if moment == "update" and ranks.rank == 1:
        interrupt_within_update_2(trainer)
    try:
        for record in trainer.fit(examples(5)):
            if moment == "loop" and ranks.rank == 1 and record.step == 2:
                signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("Ctrl-C", end=" ")
    print(trainer.step, digest_of(trainer))


def interrupt_within_update_2(trainer: LoRATrainer) -> None:
    """Once, before the rank's own part of the sums."""
    to_arrays, interrupted = trainer.loss.to_arrays, list[bool]()

    def interrupting(batch: Any) -> Any:
        if trainer.step == 1 and not interrupted:
            interrupted.append(True)
            signal.raise_signal(signal.SIGINT)
        return to_arrays(batch)

    trainer.loss = trainer.loss._replace(to_arrays=interrupting)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's & leaves ignored
    with join_ranks(60.0) as ranks:
        train(ranks, sys.argv[1])
        train(ranks, None)
