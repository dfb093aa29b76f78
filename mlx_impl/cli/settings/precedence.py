"""The settings of a command: flags win over the settings file. No MLX import."""

from __future__ import annotations

import argparse
import json
import reprlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...config import LoRAConfig
from .flag_hints import hint
from .lora_flags import LORA_FLAGS

NOT_IN_FILES = ("help", "config")
# Flags that exclude each other, beside the parser's own mutually exclusive groups.
EXCLUSIVE = (("adapter_path", "resume"), ("targets", "mask_prompt"))
BOOLEANS = {True: True, False: False, "yes": True, "no": False, "on": True, "off": False}
# Left out of config.yaml: the run may be repeated in another folder, with another library.
NOT_SAVED = (
    *("command", "config", "adapter_path", "overwrite", "resume", "blas", "json", "distributed"),
    "train",  # always
)
SHORT_REPR = reprlib.Repr()
SHORT_REPR.maxlevel = 2  # a few lines of YAML can hold nested lists of millions of items


def merge_settings(
    command: argparse.ArgumentParser, raw: dict[Any, Any], given: dict[str, Any], path: Path
) -> dict[str, Any]:
    """The given flags and, where they leave room, the raw settings read from `path`.

    A given flag replaces the setting of its own name and those that exclude it; --init-adapter replaces all
    settings of the adapter.
    """
    settings = typed_settings(command, raw, path)
    if "init_adapter" in given:
        settings = {key: value for key, value in settings.items() if key not in LORA_FLAGS}
    groups = [
        *EXCLUSIVE,
        *([a.dest for a in group._group_actions] for group in command._mutually_exclusive_groups),
    ]
    for group in groups:
        in_file = [key for key in group if key in settings]
        if len(in_file) > 1:
            raise ValueError(f"{path}: {in_file[0]} and {in_file[1]} exclude each other: give only one")
        if any(key in given for key in group):
            settings = {key: value for key, value in settings.items() if key not in group}
    return {**settings, **given}


def typed_settings(command: argparse.ArgumentParser, raw: dict[Any, Any], path: Path) -> dict[str, Any]:
    """The raw settings with `_` in their keys and the types of the flags; ValueError names a wrong key."""
    actions = {action.dest: action for action in command._actions if action.dest not in NOT_IN_FILES}
    settings: dict[str, Any] = {}
    for raw_key, value in raw.items():
        key = raw_key.replace("-", "_") if isinstance(raw_key, str) else raw_key
        if key not in actions:
            instead = hint(str(key), actions, "key") or "; keys are the flags without the leading dashes"
            raise ValueError(f"{path}: unknown key {SHORT_REPR.repr(raw_key)}{instead}")
        if key in settings:
            raise ValueError(f"{path}: the key {key} is repeated")
        settings[key] = typed_value(actions[key], value, path)
    return settings


def typed_value(action: argparse.Action, value: object, path: Path) -> Any:
    """The value with the type of the flag; ValueError with the path and the key."""
    key, shown = action.dest, SHORT_REPR.repr(value)
    if key == "blas" and value not in ("auto", "off"):  # a file from someone else must not load a library
        raise ValueError(
            f"{path}: blas must be auto or off in a file, got {shown}: name a library with --blas instead"
        )
    try:
        return converted(action, value)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{path}: {key} {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {key} must be {error}, got {shown}") from None


def converted(action: argparse.Action, value: object) -> Any:
    """The value with the type of the flag; ValueError whose message is what it must be."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if isinstance(value, (bool, str)) and value in BOOLEANS:
            return BOOLEANS[value]
        raise ValueError("true or false")
    if action.nargs == "?" and isinstance(value, bool):  # a flag that may stand alone
        return action.const if value else None
    if action.type in (int, float):
        return as_number(action.type, value)
    text = as_flag_text(action.dest, value)
    if action.choices is not None and text not in action.choices:
        raise ValueError(f"one of {', '.join(map(str, action.choices))}")
    return action.type(text) if callable(action.type) else text


def as_number(kind: Any, value: object) -> int | float:
    try:
        if not isinstance(value, bool) and isinstance(value, (int, kind)):
            return kind(value)
    except OverflowError:  # an int too large for a float
        pass
    raise ValueError("a whole number" if kind is int else "a number")


def as_flag_text(key: str, value: object) -> str:
    """The value as a flag spells it: a string, a list of target names or a mapping of patterns."""
    if isinstance(value, str):
        return value
    if key == "target_modules":
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return ",".join(value)
        raise ValueError("a string or a list of strings")
    if key == "template_args":
        if isinstance(value, dict):
            return json.dumps(value)
        raise ValueError("a JSON object")
    if key == "columns":
        if isinstance(value, dict) and all(isinstance(v, str) for pair in value.items() for v in pair):
            return ",".join(f"{name}={column}" for name, column in value.items())
        raise ValueError("a string or names with names")
    if key in ("rank_pattern", "alpha_pattern"):
        kind = int if key == "rank_pattern" else float
        try:
            if isinstance(value, dict):
                return ",".join(f"{name}={as_number(kind, number)!r}" for name, number in value.items())
        except ValueError:
            pass
        raise ValueError(f"names with {'whole ' if kind is int else ''}numbers")
    raise ValueError("a string")


def resolved_settings(args: argparse.Namespace, lora: LoRAConfig | None, **more: Any) -> dict[str, Any]:
    """All settings of a run, with the defaults written out, as `--config` reads them.

    `more` replaces settings of the flags. None is left out: such a setting depends on the machine, or comes
    from --init-adapter.
    """
    settings = {key: value for key, value in vars(args).items() if key not in NOT_SAVED}
    if args.iters is not None:
        del settings["epochs"]
    settings.update(dict.fromkeys(LORA_FLAGS), **more)
    if lora is not None:
        settings.update(asdict(lora))
        targets = lora.target_modules
        if isinstance(targets, tuple):
            settings["target_modules"] = list(targets)
        elif targets != "all-linear":
            settings["target_regex"] = settings.pop("target_modules")
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    return {key: value for key, value in plain.items() if value is not None and value != {}}
