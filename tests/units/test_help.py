"""The help texts of all commands."""

from __future__ import annotations

import argparse

import pytest

from mlx_impl.cli.parser import command_parsers, make_parser

COMMANDS = command_parsers(make_parser())


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_flag_says_its_default(command: argparse.ArgumentParser) -> None:
    """Required flags have none."""
    flags = [action for action in command._actions if action.dest != "help"]
    assert [
        action.dest for action in flags if "default" not in (action.help or "") and not action.required
    ] == []


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_the_default_in_the_help_is_the_default(command: argparse.ArgumentParser) -> None:
    """A default of None depends on another flag, the machine or the model, and is not checked."""
    for action in command._actions:
        help_text = command._get_formatter()._expand_help(action) if action.help else ""
        if action.dest != "help" and action.default is not None:
            is_switch = isinstance(action.default, bool)
            shown = ("no", "yes")[action.default] if is_switch else str(action.default)
            assert f"(default: {shown}" in help_text, action.dest


def test_help_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Except the usage: argparse does not break lines within a mutually exclusive group."""
    monkeypatch.setenv("COLUMNS", "80")
    for command in COMMANDS.values():
        lines = command.format_help().removeprefix(command.format_usage()).splitlines()
        assert max(map(len, lines)) <= 80
