"""What each rank of `test_ranks.py` runs; with `--alone`, one process without a group."""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_impl.cli.signals import StoppedBySignal, defer_signals, handle_signals, raise_stopped
from mlx_impl.config import LoRAConfig, TrainConfig
from mlx_impl.data import Example
from mlx_impl.lora import add_lora, lora_parameters
from mlx_impl.model import CausalLM
from mlx_impl.run import ranks as ranks_module
from mlx_impl.run.ranks import join_ranks
from mlx_impl.run.trainer import LoRATrainer
from mlx_impl.run.watchdog import RankLost
from tests.tiny_model import TINY_LLAMA

LORA = LoRAConfig(rank=3, alpha=5.0, dropout=0.25, use_dora=True)
# Five examples, one a micro-batch: windows of three and of two, of unequal numbers of targets.
TRAINING = TrainConfig(
    iters=5,
    batch_size=1,
    grad_accumulation_steps=3,
    learning_rate=0.01,
    loraplus_lr_ratio=4.0,
    max_grad_norm=0.5,
    lr_schedule="cosine",
    warmup_steps=1,
    weight_decay=0.1,
)


def examples(count: int) -> list[Example]:
    lengths = [4 + 3 * number for number in range(count)]
    return [
        Example(tuple(7 * i * length % 59 + 1 for i in range(length)), tuple(i > 1 for i in range(length)))
        for length in lengths
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--slowly", action="store_true")
    parser.add_argument("--hang", action="store_true")
    parser.add_argument("--join-timeout", type=float)
    parser.add_argument("--differ")
    parser.add_argument("--stop-after", type=int)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--slice", type=int)
    args = parser.parse_args()
    if args.slice:
        ranks_module.SLICE = args.slice
    if args.join_timeout:
        ranks_module.JOIN_TIMEOUT = args.join_timeout
        print("joining", flush=True)
    with handle_signals(raise_stopped):
        ranks = None if args.alone else join_ranks(args.timeout)
    is_other = ranks is not None and ranks.rank == 1
    mx.random.seed(3 if args.differ == "model" and is_other else 2)
    model = CausalLM(TINY_LLAMA)
    if args.differ == "factors":
        mx.random.seed(is_other)
        add_lora(model, LORA)
    if args.differ == "order" and ranks is not None:
        ranks.in_order = is_other
    data = examples(6 if args.differ == "data" and is_other else 5)
    training = replace(TRAINING, seed=9) if args.differ == "seed" and is_other else TRAINING
    trainer = LoRATrainer(model, LORA, training, ranks=ranks)
    if args.state and args.state.exists():
        trainer.resume(args.state, data)
    for record in islice(trainer.fit(data), args.stop_after):
        if args.slowly or args.hang:
            print(record.step, flush=True)
            time.sleep(1.0 if args.slowly else 60.0 * is_other)
    if args.state:
        trainer.save(args.state, data)
    print(trainer.step, trainer.evaluate(data), digest_of(trainer))


def digest_of(trainer: LoRATrainer) -> str:
    digest = hashlib.sha256()
    for name, factor in sorted(lora_parameters(trainer.model).items()):
        digest.update(name.encode() + np.array(factor).tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    try:
        with defer_signals():
            main()
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except RankLost as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except StoppedBySignal as stop:
        sys.exit(stop.exit_code)
