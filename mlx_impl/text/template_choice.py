"""Which chat template is used, and with which arguments: `--chat-template` and `--template-args`.

Arguments become assignments at the head of the template. So one file, `chat_template.jinja`, makes an adapter
or a fused model render as its training did, here and in every program that reads that file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ..disk.files import one_line, read_text
from .conversation import is_text
from .messages import without_nulls

FILE = "chat_template.jinja"  # beside a model's tokenizer, or an adapter
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What a template gets from elsewhere, and what Jinja would read as something else than a name.
RESERVED = {
    *("messages", "tools", "add_generation_prompt", "bos_token", "eos_token"),
    *("raise_exception", "strftime_now", "range", "dict", "namespace", "cycler", "joiner", "self", "loop"),
    *("and", "or", "not", "in", "is", "if", "else", "true", "false", "none", "True", "False", "None"),
}
Sources = Mapping[str, str]  # templates by name; "default" is the one of conversations without tools


@dataclass(frozen=True)
class TemplateChoice:
    """By default the model's own template, without arguments."""

    template: str | None = None  # a file, or the name of one of the model's templates
    arguments: Mapping[str, Any] = field(default_factory=dict)
    adapter: Path | None = None  # a folder whose template, if it has one, replaces the model's

    def choose(self, own: Sources) -> dict[str, str]:
        """The templates to use in place of the model's own; ValueError where there is none to choose."""
        if self.template is not None:
            chosen = {"default": find_template(self.template, own)}
        else:
            adapters = None if self.adapter is None else template_of_adapter(self.adapter)
            chosen = dict(own) if adapters is None else {"default": adapters}
        if self.arguments and not chosen:
            raise ValueError("--template-args are for a chat template, and the model has none")
        return {name: with_arguments(source, self.arguments) for name, source in chosen.items()}


def find_template(name: str, own: Sources) -> str:
    """The text of a file, or the model's template of that name."""
    path = Path(name)
    if name and os.path.isfile(path):
        return read_template(path)
    if name in own:
        return own[name]
    names = one_line(", ".join(own)) or "none"
    raise ValueError(
        f"--chat-template must be a file, or one of the model's templates ({names}), got {one_line(name)!r}"
    )


def read_template(path: Path) -> str:
    """A template as text, or the one in a JSON object with "chat_template", as processors save it."""
    text = read_text(path).removeprefix("\ufeff")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(value, dict):
        return text
    if not isinstance(value.get("chat_template"), str):
        raise ValueError(f'{path}: must be a template, or a JSON object with the text "chat_template"')
    return str(value["chat_template"])


def template_of_adapter(folder: Path) -> str | None:
    """The template with which the adapter was trained, if that was not the model's own."""
    return read_template(folder / FILE) if (folder / FILE).exists() else None


def parse_arguments(text: str) -> dict[str, Any]:
    """The arguments in a JSON object, without those that are null; ValueError for what cannot be one."""
    flag = "--template-args"
    try:
        value = json.loads(text, parse_constant=refuse_constant)
        json.dumps(value, allow_nan=False)  # raises for 1e999, which is read as infinity
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{flag} must be a JSON object: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{flag} must be a JSON object, got {one_line(text)}")
    if not is_text(json.dumps(value, ensure_ascii=False)):
        raise ValueError(f"{flag} must be valid Unicode, got half a surrogate pair")
    for name in value:
        if name in RESERVED or not NAME.fullmatch(name):
            raise ValueError(
                f"{flag} must have names that a template can be given, got {one_line(repr(name))}"
            )
    return dict(without_nulls(value))


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def with_arguments(source: str, arguments: Mapping[str, Any]) -> str:
    """The template with these arguments, unless it is given others of the same names."""
    sets = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}"
        f"{{% endif %}}"
        for name, value in arguments.items()
    )
    return f"{sets}\n{source}" if sets else source  # trim_blocks removes this line break


def as_one(sources: Sources) -> str:
    """One template that renders as these do: "tool_use" where there are tools, else "default"."""
    if "tool_use" not in sources:
        return sources["default"]
    with_tools, without = (sources[name].removesuffix("\n") for name in ("tool_use", "default"))
    return f"{{% if tools %}}\n{with_tools}{{%+ else %}}\n{without}{{%+ endif %}}"


def replacement(own: Sources, chosen: Sources) -> str | None:
    """The template to save beside an adapter: None where it is the model's own."""
    return None if dict(own) == dict(chosen) or "default" not in chosen else as_one(chosen)


def digest_of(template: str) -> str:
    return hashlib.sha256(template.encode()).hexdigest()
