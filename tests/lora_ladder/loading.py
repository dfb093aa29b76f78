"""Loads the trainer class that `--trainer` names, or says in one sentence why it cannot be judged."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from tests.lora_ladder.names import Unusable, did_you_mean, require_module_and_class
from tests.lora_ladder.protocol import REQUIRED, Dialect


def load_trainer(name: str, option: str = "--trainer") -> Any:
    """The class that `module:Class` names. Raises UsageError if it cannot be judged."""
    module_name, _, class_name = name.partition(":")
    try:
        require_module_and_class(name, option)
        module = importlib.import_module(module_name)
    except Unusable as error:
        raise pytest.UsageError(str(error)) from None
    except (Exception, SystemExit) as error:
        raise pytest.UsageError(f"{option} {name}: {sentence_of(error)}") from None
    try:
        trainer = getattr(module, class_name)
    except AttributeError as error:
        hint = did_you_mean(class_name, [n for n, one in vars(module).items() if isinstance(one, type)])
        raise pytest.UsageError(f"{option} {name}: {sentence_of(error)}{hint}") from None
    except (Exception, SystemExit) as error:
        raise pytest.UsageError(f"{option} {name}: {sentence_of(error)}") from None
    wrong = what_is_wrong_with(trainer)
    if wrong:
        raise pytest.UsageError(f"{option} {name}: {wrong}")
    return trainer


def sentence_of(error: BaseException) -> str:
    """The exception's type and the first line of its message."""
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def what_is_wrong_with(trainer: Any) -> str | None:
    """A sentence; None for a class that has the required members."""
    if not isinstance(trainer, type):
        return f"must be a class, got {type(trainer).__name__}"
    missing = [member for member in REQUIRED if getattr(trainer, member, None) is None]
    if missing:
        return f"the class must have {', '.join(missing)}"
    if not isinstance(trainer.dialect, Dialect):  # type: ignore[attr-defined]
        return f"dialect must be a Dialect, got {type(trainer.dialect).__name__}"  # type: ignore[attr-defined]
    wrong = [member for member in REQUIRED[1:] if not callable(getattr(trainer, member))]
    return f"{', '.join(wrong)} must be methods" if wrong else None
