"""The ladder as on other machines: `python -m tests.matrix`, or `tox -e matrix`.

PyTorch and MKL choose their kernels by the CPU, unless a variable says otherwise; MLX multiplies with its own
BLAS or an optimized one; and `--draw` gives the cases other weights, factors and rows. Every pair of settings
of any two of these four meets in at least one run (pairwise cover).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.lora_ladder.climb import FILES

ROOT = Path(__file__).resolve().parents[1]
ATEN = (None, "default", "avx2")  # ATEN_CPU_CAPABILITY
MKL = (None, "COMPATIBLE", "AVX2")  # MKL_CBWR
BLAS = ("off", "auto")
DRAWS = range(10)
SHARE = re.compile(r"^ +(\d+) (\w+) .* at most (\d+)% of tolerance \((.*)\)$", re.MULTILINE)


@dataclass(frozen=True)
class Setting:
    aten: str | None
    mkl: str | None
    blas: str
    draw: int

    def __str__(self) -> str:
        aten, mkl = self.aten or "unset", self.mkl or "unset"
        return f"--draw {self.draw} --blas {self.blas} ATEN_CPU_CAPABILITY={aten} MKL_CBWR={mkl}"

    def environment(self) -> dict[str, str]:
        chosen = {"ATEN_CPU_CAPABILITY": self.aten, "MKL_CBWR": self.mkl}
        rest = {name: value for name, value in os.environ.items() if name not in chosen}
        return rest | {name: value for name, value in chosen.items() if value}


@dataclass(frozen=True)
class Climbed:
    setting: Setting
    status: int
    output: str

    def shares(self) -> Iterator[tuple[int, str, int, str]]:
        """Rung, its name, the largest share of a tolerance in percent, and of which tensor."""
        for rung, name, share, tensor in SHARE.findall(self.output):
            yield int(rung), name, int(share), tensor


def pairwise_cover() -> list[Setting]:
    """Each draw under each dispatch of PyTorch; the other two go round, with periods 3 and 2."""
    return [
        Setting(ATEN[n], MKL[(n + draw) % 3], BLAS[(n + draw) % 2], draw) for draw in DRAWS for n in range(3)
    ]


def climb(setting: Setting, *options: str) -> Climbed:
    options = ("--draw", str(setting.draw), "--blas", setting.blas, *options)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *map(str, FILES)]
    done = subprocess.run(command, cwd=ROOT, env=setting.environment(), capture_output=True, text=True)
    is_without_blas = setting.blas == "auto" and "matmuls: MLX's own" in done.stdout  # none is installed
    status = done.returncode or int(is_without_blas)
    print(f"{'FAILED' if status else 'passed'}  {setting}", flush=True)
    if status:
        print(done.stdout[-4000:], done.stderr, flush=True)
    return Climbed(setting, status, done.stdout)


def largest_shares(runs: list[Climbed]) -> Iterator[str]:
    """Of each rung the run that used most."""
    found = [(*shares, run.setting) for run in runs for shares in run.shares()]
    for number in sorted({rung for rung, *_ in found}):
        of_rung = [row for row in found if row[0] == number]
        _, name, share, tensor, setting = max(of_rung, key=lambda row: row[2])
        yield f"{number:>4} {name:<14} at most {share:>3}% of a tolerance ({tensor}), {setting}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side; default: 2")
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"), help="MLX's; default: cpu")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(lambda setting: climb(setting, "--device", args.device), pairwise_cover()))
    print("\n".join(largest_shares(runs)))
    failed = sum(run.status != 0 for run in runs)
    print(f"{len(runs) - failed} of {len(runs)} runs of the ladder passed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
