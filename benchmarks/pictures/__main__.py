"""`python -m benchmarks.pictures`: draws every picture of this folder again."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import ladder, main_job, peers, step

FOLDER = Path(__file__).parent
PICTURES = {"step": step.draw, "ladder": ladder.draw, "peers": peers.draw, "main_job": main_job.draw}


def picture_path(name: str) -> Path:
    return FOLDER / f"{name}.svg"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("--run", type=Path, help="first read main_job.json anew from this run's folder")
    run = parser.parse_args(arguments).run
    if run is not None:
        main_job.write_data(run)
    for name, draw in PICTURES.items():
        picture_path(name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
