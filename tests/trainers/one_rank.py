"""One of the processes of `MlxTrainer.on_ranks`: `python -m tests.trainers.one_rank FOLDER`."""

from __future__ import annotations

import os
import pickle
import sys
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx

from mlx_impl.run.ranks import join_ranks
from tests.ring import PLANTED
from tests.trainers import mlx_impl

SECONDS = 60.0


def main(folder: Path) -> None:
    job = pickle.loads((folder / "job").read_bytes())
    mx.set_default_device(getattr(mx, job["device"]))
    trainer = getattr(mlx_impl, job["trainer"])(*job["model"])
    trainer.ranks = join_ranks(SECONDS)
    answer = getattr(trainer, job["method"])(*job["arguments"])
    (folder / f"rank {trainer.ranks.rank}").write_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    name = os.environ.get(PLANTED)
    if name:
        from tests.trainers.mutants import MUTANTS
    with MUTANTS[name].planted() if name else nullcontext():
        main(Path(sys.argv[1]))
