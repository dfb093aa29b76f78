"""What a command was asked for, from its file and its flags: the command line wins. No MLX import."""

from __future__ import annotations

import argparse
import difflib
import reprlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...config import LoRAConfig
from .lora_flags import LORA_FLAGS

NO_SETTINGS = ("help", "config")
# Beside the parser's own groups of flags that exclude each other.
RIVALS = (("adapter_path", "resume"), ("targets", "mask_prompt"))
BOOLEANS = {True: True, False: False, "yes": True, "no": False, "on": True, "off": False}
# No part of what a run can be repeated with: it is repeated in another folder, by any library.
ONE_RUN_ONLY = ("command", "config", "adapter_path", "overwrite", "resume", "blas", "json")
BRIEFLY = reprlib.Repr()
BRIEFLY.maxlevel = 2  # a few lines of YAML can hold lists within lists of millions of items


def closest(word: str, words: Iterable[str]) -> str | None:
    found = difflib.get_close_matches(word, list(words), 1)
    return found[0] if found else None


def with_settings(
    command: argparse.ArgumentParser, raw: dict[Any, Any], given: dict[str, Any], path: Path
) -> dict[str, Any]:
    """The settings at a path, but those that are given, or have a rival that is; then the given."""
    settings = settings_of(command, raw, path)
    if "init_adapter" in given:  # it brings its own
        settings = {key: value for key, value in settings.items() if key not in LORA_FLAGS}
    groups = [
        *RIVALS,
        *([a.dest for a in group._group_actions] for group in command._mutually_exclusive_groups),
    ]
    for group in groups:
        in_file = [key for key in group if key in settings]
        if len(in_file) > 1:
            raise ValueError(f"{path}: {in_file[0]} and {in_file[1]} exclude each other")
        if any(key in given for key in group):
            settings = {key: value for key, value in settings.items() if key not in group}
    return {**settings, **given}


def settings_of(command: argparse.ArgumentParser, raw: dict[Any, Any], path: Path) -> dict[str, Any]:
    """The keys, - or _ in them, and the values as the flags' own types; ValueError names the key."""
    actions = {action.dest: action for action in command._actions if action.dest not in NO_SETTINGS}
    settings: dict[str, Any] = {}
    for given, value in raw.items():
        key = given.replace("-", "_") if isinstance(given, str) else given
        if key not in actions:
            near = closest(str(key), actions)
            hint = f", the closest is {near}" if near else "; keys are the flags without the leading dashes"
            raise ValueError(f"{path}: unknown key {BRIEFLY.repr(given)}{hint}")
        if key in settings:
            raise ValueError(f"{path}: the key {key} stands twice")
        if key == "blas" and value not in ("auto", "off"):  # who sends a file does not choose what is run
            raise ValueError(
                f"{path}: blas must be auto or off in a file, got {BRIEFLY.repr(value)}: "
                f"give --blas on the command line"
            )
        try:
            settings[key] = converted(actions[key], value)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{path}: {key} {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {key} must be {error}, got {BRIEFLY.repr(value)}") from None
    return settings


def converted(action: argparse.Action, value: object) -> Any:
    """The value as the flag would have it; ValueError with what it must be."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if isinstance(value, (bool, str)) and value in BOOLEANS:
            return BOOLEANS[value]
        raise ValueError("true or false")
    if action.type in (int, float):
        return as_number(action.type, value)
    text = as_flag(action.dest, value)
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


def as_flag(key: str, value: object) -> str:
    """A text; also a list of targets and a mapping of patterns, spelled as their flags spell them."""
    if isinstance(value, str):
        return value
    if key == "target_modules":
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return ",".join(value)
        raise ValueError("a text or a list of texts")
    if key in ("rank_pattern", "alpha_pattern"):
        kind = int if key == "rank_pattern" else float
        try:
            if isinstance(value, dict):
                return ",".join(f"{name}={as_number(kind, number)!r}" for name, number in value.items())
        except ValueError:
            pass
        raise ValueError(f"names with {'whole ' if kind is int else ''}numbers")
    raise ValueError("a text")


def resolved(args: argparse.Namespace, lora: LoRAConfig | None, **more: Any) -> dict[str, Any]:
    """All settings of a run, defaults too, as `--config` reads them; `more` wins over the flags'.

    What is None is left out: it depends on the machine, or comes with --init-adapter.
    """
    settings = {key: value for key, value in vars(args).items() if key not in ONE_RUN_ONLY}
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
