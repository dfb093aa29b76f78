"""The flags that describe an adapter, and the configuration that they make. No MLX import."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from ...config import BLOCK_LINEARS, LoRAConfig
from .flags import folder, switch

LORA_DEFAULTS = LoRAConfig()  # flags that --init-adapter settles start as None
LORA_FLAGS = (*(field.name for field in fields(LoRAConfig)), "target_regex")


def add_lora_flags(group: Any) -> None:
    folder(
        group,
        "--init-adapter",
        "start from this adapter; all settings of this group come with it (default: a new one)",
    )
    group.add_argument("--rank", type=int, metavar="R", help=f"of the update (default: {LORA_DEFAULTS.rank})")
    group.add_argument(
        "--alpha",
        type=float,
        metavar="A",
        help=f"the update is scaled by alpha / rank (default: {LORA_DEFAULTS.alpha:g})",
    )
    group.add_argument(
        "--dropout",
        type=float,
        metavar="P",
        help=f"on the adapter's input, while training (default: {LORA_DEFAULTS.dropout:g})",
    )
    targets = group.add_mutually_exclusive_group()
    targets.add_argument(
        "--target-modules",
        metavar="NAMES",
        help=f"which linears: ends of their names, separated by commas, or all-linear "
        f"(default: {','.join(BLOCK_LINEARS)})",
    )
    targets.add_argument(
        "--target-regex", metavar="EXPR", help="those whose whole name matches (default: by --target-modules)"
    )
    group.add_argument(
        "--num-layers", type=int, metavar="N", help="adapt the last N layers (default: -1, all)"
    )
    for what in ("rank", "alpha"):
        group.add_argument(
            f"--{what}-pattern",
            metavar="NAME=N,...",
            help=f"another {what} for linears whose names end so (default: --{what} for all)",
        )
    switch(group, "--use-rslora", None, "scale by alpha / sqrt(rank) (default: no)")
    switch(group, "--use-dora", None, "DoRA: train direction and length of each row apart (default: no)")


def lora_config(args: argparse.Namespace) -> LoRAConfig | None:
    """The adapter that the flags describe; None when --init-adapter brings its own."""
    given = {flag: getattr(args, flag) for flag in LORA_FLAGS if getattr(args, flag) is not None}
    if args.init_adapter is not None:
        if given:
            flag = next(iter(given)).replace("_", "-")
            raise ValueError(f"--{flag} comes with the adapter of --init-adapter: give one of them")
        return None
    if given.get("target_modules", "all-linear") != "all-linear":
        given["target_modules"] = tuple(parts(given["target_modules"]))
    if "target_regex" in given:
        given["target_modules"] = given.pop("target_regex")
    for flag, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        if flag in given:
            given[flag] = to_pattern(flag, given[flag], kind)
    return LoRAConfig(**given)


def parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def to_pattern(flag: str, text: str, kind: type) -> dict[str, int | float]:
    """NAME=NUMBER,NAME=NUMBER,... with every name once."""
    rows = [part.rpartition("=") for part in parts(text)]
    try:
        pattern = {name.strip(): kind(value) for name, _, value in rows}
    except ValueError:
        pattern = {}
    if not rows or "" in pattern or len(pattern) < len(rows):
        noun = "a whole number" if kind is int else "a number"
        flag = flag.replace("_", "-")
        raise ValueError(f"--{flag} must be NAME=N,NAME=N,..., each name once and N {noun}, got {text!r}")
    return pattern
