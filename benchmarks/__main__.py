"""`python -m benchmarks`: one table, us beside the others, from steps taken in turn."""

from __future__ import annotations

import argparse
import json
import sys

from .cases import CASES, Case, named_case
from .contestants import CONTESTANTS
from .measure import measure
from .table import as_json, print_table

ON_A_CPU = ("ours", "mlx-lm", "peft", "pytorch")
ON_A_GPU = ("ours", "mlx-lm", "peft", "peft-compiled")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--case", default="smollm2", choices=CASES, help="default: smollm2")
    parser.add_argument("--steps", type=int, default=20, help="warm steps of each side; default: 20")
    parser.add_argument(
        "--only", help="comma-separated sides, the first is ours; see contestants/__init__.py"
    )
    parser.add_argument("--json", action="store_true", help="print one object and nothing else")
    return parser


def contestants(case: Case, only: str | None) -> list[str]:
    """Those that were asked for, or those of the device that are installed."""
    names = only.split(",") if only else ON_A_GPU if case.needs_gpu else ON_A_CPU
    if unknown := [name for name in names if name not in CONTESTANTS]:
        raise ValueError(f"a side must be one of {', '.join(CONTESTANTS)}, got {unknown[0]!r}")
    return [name for name in names if CONTESTANTS[name].is_installed]


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    case = named_case(args.case)
    try:
        run = measure(case, contestants(case, args.only), args.steps)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(as_json(run)))
    else:
        print_table(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
