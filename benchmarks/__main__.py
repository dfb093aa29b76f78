"""`python -m benchmarks`: step time and memory beside other trainers, from steps taken in turn."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from textwrap import fill

from fixtures.own_files import require_committed

from .cases import CASES, Case, named_case
from .contestants import named_entry
from .curves import CURVES, draw, measure_curve, picture, table_of
from .measure import measure, measure_as_installed
from .memory_run import Comparison, compare_with_model
from .memory_table import MODELLED, comparison_table, model_table
from .readme import NOTES, README, WIDTH, write_part
from .table import HEADINGS, as_json, markdown, notes, print_table, rows
from .worker import call, is_gpu

ON_A_CPU = ("ours", "mlx-lm", "peft", "pytorch")
ON_A_GPU = ("ours", "mlx-lm", "peft", "peft-compiled")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "what",
        nargs="?",
        default="table",
        choices=("table", "curves", "memory"),
        help="table: this trainer beside others; curves: how step time and memory grow; "
        "memory: where memory goes. Default: table",
    )
    parser.add_argument(
        "--case", default="smollm2", choices=CASES, help="what the table measures; default: smollm2"
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each trainer; default: 20")
    parser.add_argument("--only", help="comma-separated trainers, ours first; see contestants/__init__.py")
    parser.add_argument(
        "--as-installed", action="store_true", help="mlx-lm with the BLAS that MLX ships; takes minutes"
    )
    parser.add_argument("--json", action="store_true", help="print the table as one JSON object only")
    parser.add_argument(
        "--write", action="store_true", help="rewrite the tables and charts in benchmarks/, if committed"
    )
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Raises SystemExit(2) for a flag that would be ignored or would write a misleading table."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    trainers = args.only.split(",") if args.only else []
    if args.steps < 1:
        parser.error(f"--steps must be 1 or more, got {args.steps}")
    if trainers and trainers[0] != "ours":
        parser.error(f"--only must begin with ours, got {args.only!r}")
    if len(set(trainers)) < len(trainers):
        parser.error(f"--only must name each trainer once, got {args.only!r}")
    for name in ("case", "steps", "only", "as_installed", "json"):
        if args.what != "table" and getattr(args, name) != parser.get_default(name):
            parser.error(f"{args.what} takes no --{name.replace('_', '-')}")
    if args.as_installed and (args.steps != parser.get_default("steps") or args.only):
        parser.error("--as-installed measures two steps of ours and mlx-lm: no --steps, no --only")
    if args.write and (args.case != parser.get_default("case") or args.only):
        parser.error("--write accepts only the case smollm2 with all its trainers")
    return args


def contestants(case: Case, only: str | None) -> list[str]:
    """The requested trainers, else those of the device; only installed ones that can run the case."""
    names = only.split(",") if only else ON_A_GPU if case.needs_gpu else ON_A_CPU
    entries = {name: named_entry(name) for name in names}
    return [name for name, entry in entries.items() if entry.is_installed and entry.can_run(case)]


def show_table(args: argparse.Namespace) -> None:
    case = named_case(args.case)
    if case.needs_gpu and not call(is_gpu):
        raise ValueError(f"the case {case.name} needs a GPU, and MLX has none here")
    if args.as_installed:
        run = measure_as_installed(case)
    else:
        run = measure(case, contestants(case, args.only), args.steps)
    if args.json:
        print(json.dumps(as_json(run)))
    else:
        print_table(run)
    if args.write:
        part = "as-installed" if args.as_installed else "table"
        write_part(part, markdown(HEADINGS, rows(run)) + "\n\n" + fill("; ".join(notes(run)) + ".", WIDTH))


def show_curves(args: argparse.Namespace) -> None:
    for curve in CURVES.values():
        points = measure_curve(curve)
        print(table_of(curve, points), flush=True)
        if args.write:
            draw(curve, points)


def show_memory(args: argparse.Namespace) -> None:
    compared: dict[tuple[str, bool], Comparison] = {
        (name, is_checkpointed): call(compare_with_model, replace(case, checkpointed=is_checkpointed))
        for name, case in MODELLED.items()
        for is_checkpointed in (False, True)
    }
    first = compared["smollm2", False]
    for name, body, document in (
        ("memory", model_table(first.shapes, first.budget), NOTES),
        ("memory-check", comparison_table(compared), README),
    ):
        print(body, end="\n\n")
        if args.write:
            write_part(name, body, document)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        if args.write:  # before an hour of measurements
            charts = map(picture, CURVES.values()) if args.what == "curves" else ()
            require_committed([README, NOTES, *charts])
        {"table": show_table, "curves": show_curves, "memory": show_memory}[args.what](args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
