"""`python -m benchmarks`: one table, us beside the others, from steps taken in turn."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace

from fixtures.own_files import require_committed

from .cases import CASES, Case, named_case
from .contestants import named_entry
from .curves import CURVES, draw, measure_curve, picture, table_of
from .measure import measure, measure_as_installed
from .memory_run import Held, held_against_model
from .memory_table import MODELLED, held_table, model_table
from .readme import README, write_part
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
        help="the table; or how seconds and bytes grow; or where memory goes. Default: table",
    )
    parser.add_argument("--case", default="smollm2", choices=CASES, help="of the table; default: smollm2")
    parser.add_argument("--steps", type=int, default=20, help="warm steps of each side; default: 20")
    parser.add_argument("--only", help="comma-separated sides, ours first; see contestants/__init__.py")
    parser.add_argument(
        "--as-installed", action="store_true", help="mlx-lm with the BLAS that MLX brings: minutes"
    )
    parser.add_argument("--json", action="store_true", help="the table as one object and nothing else")
    parser.add_argument(
        "--write", action="store_true", help="into README.md, pictures beside it, if committed"
    )
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """What would be ignored, or be written where it does not belong, is an error."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    sides = args.only.split(",") if args.only else []
    if args.steps < 1:
        parser.error(f"--steps must be 1 or more, got {args.steps}")
    if sides and sides[0] != "ours":
        parser.error(f"--only must begin with ours, got {args.only!r}")
    if len(set(sides)) < len(sides):
        parser.error(f"--only must name each side once, got {args.only!r}")
    for name in ("case", "steps", "only", "as_installed", "json"):
        if args.what != "table" and getattr(args, name) != parser.get_default(name):
            parser.error(f"{args.what} takes no --{name.replace('_', '-')}")
    if args.as_installed and (args.steps != parser.get_default("steps") or args.only):
        parser.error("--as-installed is two steps of ours and mlx-lm: no --steps, no --only")
    if args.write and (args.case != parser.get_default("case") or args.only):
        parser.error("--write puts the case smollm2 with all its sides into README.md, and nothing else")
    return args


def contestants(case: Case, only: str | None) -> list[str]:
    """Those that were asked for, or those of the device that are installed."""
    names = only.split(",") if only else ON_A_GPU if case.needs_gpu else ON_A_CPU
    return [name for name in names if named_entry(name).is_installed]


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
        write_part(part, markdown(HEADINGS, rows(run)) + "\n\n" + "; ".join(notes(run)) + ".")


def show_curves(args: argparse.Namespace) -> None:
    for curve in CURVES.values():
        points = measure_curve(curve)
        print(table_of(curve, points), flush=True)
        if args.write:
            draw(curve, points)
            write_part(f"curve-{curve.name}", table_of(curve, points))


def show_memory(args: argparse.Namespace) -> None:
    held: dict[tuple[str, bool], Held] = {
        (name, is_checkpointed): call(held_against_model, replace(case, checkpointed=is_checkpointed))
        for name, case in MODELLED.items()
        for is_checkpointed in (False, True)
    }
    first = held["smollm2", False]
    parts = {"memory": model_table(first.shapes, first.budget), "memory-held": held_table(held)}
    for name, body in parts.items():
        print(body, end="\n\n")
        if args.write:
            write_part(name, body)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        if args.write:  # before an hour of measurements
            pictures = map(picture, CURVES.values()) if args.what == "curves" else ()
            require_committed([README, *pictures])
        {"table": show_table, "curves": show_curves, "memory": show_memory}[args.what](args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
