"""What --help says of every command."""

from __future__ import annotations

import argparse

import pytest

from mlx_impl.cli.parser import commands_of, make_parser

COMMANDS = commands_of(make_parser())


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_flag_says_its_default(command: argparse.ArgumentParser) -> None:
    """But for those that must be given."""
    flags = [action for action in command._actions if action.dest != "help"]
    assert [
        action.dest for action in flags if "default" not in (action.help or "") and not action.required
    ] == []


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_the_default_that_it_says_is_the_default(command: argparse.ArgumentParser) -> None:
    """Where there is one: none follows from another flag, the machine or the model."""
    for action in command._actions:
        help_text = command._get_formatter()._expand_help(action) if action.help else ""
        if action.dest != "help" and action.default is not None:
            is_switch = isinstance(action.default, bool)
            shown = ("no", "yes")[action.default] if is_switch else str(action.default)
            assert f"(default: {shown}" in help_text, action.dest


def test_help_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the usage, in which argparse breaks no group of flags that exclude each other."""
    monkeypatch.setenv("COLUMNS", "80")
    for command in COMMANDS.values():
        lines = command.format_help().removeprefix(command.format_usage()).splitlines()
        assert max(map(len, lines)) <= 80
