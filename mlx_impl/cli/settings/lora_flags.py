"""The flags that describe an adapter, and the LoRAConfig that they make. No MLX import."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from ...config import BLOCK_LINEARS, LoRAConfig
from .flags import add_folder, add_switch

# Only shown in the help: the flags' own default is None, so that a given flag can be told from a default.
LORA_DEFAULTS = LoRAConfig()
LORA_FLAGS = (*(field.name for field in fields(LoRAConfig)), "target_regex")


def add_lora_flags(group: Any) -> None:
    add_folder(
        group,
        "--init-adapter",
        "start from this adapter, which also sets all other flags of this group (default: a new adapter)",
    )
    group.add_argument(
        "--rank", type=int, metavar="R", help=f"rank of the adapter (default: {LORA_DEFAULTS.rank})"
    )
    group.add_argument(
        "--alpha",
        type=float,
        metavar="A",
        help=f"scale the update by alpha / rank (default: {LORA_DEFAULTS.alpha:g})",
    )
    group.add_argument(
        "--dropout",
        type=float,
        metavar="P",
        help=f"dropout probability on the adapter's input (default: {LORA_DEFAULTS.dropout:g})",
    )
    add_target_flags(group)
    add_pattern_flags(group)
    add_switch(group, "--use-rslora", None, "rank-stabilized LoRA: scale by alpha / sqrt(rank) (default: no)")
    add_switch(
        group,
        "--use-dora",
        None,
        "DoRA: train the magnitude and the direction of each weight row separately (default: no)",
    )


def add_target_flags(group: Any) -> None:
    targets = group.add_mutually_exclusive_group()
    targets.add_argument(
        "--target-modules",
        metavar="NAMES",
        help="linear layers to adapt: the ends of their names, separated by commas, or all-linear "
        f"(default: all of a block: {', '.join(BLOCK_LINEARS)})",
    )
    targets.add_argument(
        "--target-regex",
        metavar="EXPR",
        help="adapt the linear layers whose full name matches EXPR (default: use --target-modules)",
    )
    group.add_argument(
        "--num-layers", type=int, metavar="N", help="adapt only the last N layers (default: -1, all)"
    )


def add_pattern_flags(group: Any) -> None:
    for what in ("rank", "alpha"):
        group.add_argument(
            f"--{what}-pattern",
            metavar="NAME=N,...",
            help=f"use {what} N for linear layers whose name ends in NAME (default: --{what} for all)",
        )


def lora_config(args: argparse.Namespace) -> LoRAConfig | None:
    """The LoRAConfig that the flags describe; None with --init-adapter, whose adapter has its own."""
    given = {flag: getattr(args, flag) for flag in LORA_FLAGS if getattr(args, flag) is not None}
    if args.init_adapter is not None:
        if given:
            flag = next(iter(given)).replace("_", "-")
            raise ValueError(f"--init-adapter sets --{flag}: give only one of them")
        return None
    if given.get("target_modules", "all-linear") != "all-linear":
        given["target_modules"] = tuple(split_names(given["target_modules"]))
    if "target_regex" in given:
        given["target_modules"] = given.pop("target_regex")
    for flag, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        if flag in given:
            given[flag] = parse_pattern(flag, given[flag], kind)
    return LoRAConfig(**given)


def split_names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_pattern(flag: str, text: str, kind: type) -> dict[str, int | float]:
    """{"q_proj": 4, ...} from "q_proj=4,..."; ValueError for another form or a repeated name."""
    rows = [part.rpartition("=") for part in split_names(text)]
    try:
        pattern = {name.strip(): kind(value) for name, _, value in rows}
    except ValueError:
        pattern = {}
    if not rows or "" in pattern or len(pattern) < len(rows):
        noun = "a whole number" if kind is int else "a number"
        flag = flag.replace("_", "-")
        raise ValueError(
            f"--{flag} must be NAME=N,NAME=N,... with different names and N {noun}, got {text!r}"
        )
    return pattern
