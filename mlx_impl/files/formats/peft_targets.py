"""Which linears of a model PEFT's record adapts.

Source: PEFT 0.21's `check_target_module_exists`: names or an expression, less `exclude_modules`, and of names
only those in `layers_to_transform`, which are the numbers after one of `layers_pattern`. A name that matches
nothing is ignored, as by PEFT: the tensors say which linears have an adapter.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from ...targets import compiled, ends_with, matches_end
from .factors import split_block

Targets = tuple[str, ...] | str
ANY_LAYER = r".*?\.[^.]*\.(\d+)\."


def read_targets(record: dict[str, Any], key: str = "target_modules") -> Targets:
    """Names, or an expression."""
    value = record.get(key)
    if isinstance(value, str):
        return "all-linear" if value.lower() == "all-linear" and key == "target_modules" else value
    if not isinstance(value, list) or not all(isinstance(target, str) for target in value):
        raise ValueError(f"{key} must be a list of names or a regular expression, got {value!r}")
    return tuple(value)


def is_adapted(name: str, record: dict[str, Any]) -> bool:
    """Whether PEFT adapts the module; "all-linear" leaves out what is outside the blocks."""
    targets = read_targets(record)
    if record.get("exclude_modules") and matches(name, read_targets(record, "exclude_modules")):
        return False
    if targets == "all-linear":
        return split_block(name) is not None
    if not matches(name, targets):
        return False
    layers = read_layers(record)
    return layers is None or isinstance(targets, str) or layer_of(name, record) in layers


def matches(name: str, targets: Targets) -> bool:
    if isinstance(targets, str):
        return compiled(targets).fullmatch(name) is not None
    return any(ends_with(name, target) for target in targets)


def read_layers(record: dict[str, Any]) -> Collection[int] | None:
    """The numbers of the layers; None for all."""
    value = record.get("layers_to_transform")
    if value is None or value == []:
        return None
    numbers = value if isinstance(value, list) else [value]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise ValueError(f"layers_to_transform must be a number or a list of numbers, got {value!r}")
    return numbers


def layer_of(name: str, record: dict[str, Any]) -> int | None:
    """The number of the module's layer, after the first of layers_pattern that is in its name."""
    patterns = record.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"layers_pattern must be a name or a list of names, got {patterns!r}")
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [ANY_LAYER]
    found: re.Match[str] | None = next((m for e in expressions if (m := compiled(e).match(name))), None)
    return int(found[1]) if found else None


def in_this_model(record: dict[str, Any], linears: Sequence[str]) -> tuple[Targets, int]:
    """target_modules and num_layers of the LoRAConfig that adapts the same of these linears.

    They are the record's names in the last layers, or where that cannot say it, the linears' full names.
    """
    targets, chosen = read_targets(record), [name for name in linears if is_adapted(name, record)]
    if not chosen and (read_layers(record) is not None or record.get("exclude_modules")):
        raise ValueError(
            "target_modules, layers_to_transform and exclude_modules must leave a linear of this model, "
            "and leave none"
        )
    if not chosen:
        return targets, -1  # `select_targets` names the targets that match nothing
    if isinstance(targets, tuple):
        targets = tuple(t for t in targets if any(ends_with(name, t) for name in linears))
    if read_layers(record) is None and not record.get("exclude_modules"):
        return targets, -1
    blocks = {name: split[0] for name in linears if (split := split_block(name))}
    num_blocks = max(blocks.values()) + 1
    for num_layers in range(1, num_blocks + 1):
        last = [name for name in linears if blocks.get(name, -1) >= num_blocks - num_layers]
        if [n for n in last if targets == "all-linear" or matches(n, targets)] == chosen:
            return targets, num_layers
    return tuple(chosen), -1


def matching_patterns(patterns: dict[str, Any], linears: Sequence[str]) -> dict[str, Any]:
    """Those that match one of these linears, which are adapted: PEFT ignores the others."""
    return {p: value for p, value in patterns.items() if any(matches_end(name, p) for name in linears)}
