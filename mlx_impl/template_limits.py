"""How long what a chat template makes may be: asked before it is made.

Bounded is each text and list that comes of an operator, of a filter or method named below, or of printing.
Not bounded is the sum of all that a template keeps at once, nor what other filters (escape, urlize, wordwrap
with a long `wrapstring`, pprint, and tojson of a list that holds one text many times) add to a long text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from string import Formatter
from typing import Any

import jinja2

MAX_LENGTH = 2**24  # of one result
PRINTF_WIDTH = re.compile(r"%(\([^)]*\))?[-+ #0-9.]*(\*|[0-9]{7})")
FORMAT_WIDTH = re.compile(r"\{|[0-9]{7}")


def require_length(length: float) -> None:
    if length > MAX_LENGTH:
        raise jinja2.TemplateError(f"it makes something longer than {MAX_LENGTH}")


def of_width(text: Any, width: int = 80, *_: Any, **__: Any) -> float:
    return width


def of_indented(text: Any, width: int | str = 4, *_: Any, **__: Any) -> float:
    return (1 + str(text).count("\n")) * (len(width) if isinstance(width, str) else width)


def of_replaced(text: Any, old: str, new: str, count: int | None = None) -> float:
    return str(text).count(str(old)) * len(str(new))


def of_tabs(text: str, tabsize: int = 8) -> float:
    return text.count("\t") * tabsize


def of_joined(separator: str, items: Any) -> float:
    return sum(len(separator) + len(str(item)) for item in items)


def of_items_joined(items: Any, d: str = "", attribute: Any = None) -> float:
    return of_joined(str(d), items)


def of_json(value: Any, ensure_ascii: bool = False, indent: int | str | None = None, **_: Any) -> float:
    return len(indent) if isinstance(indent, str) else 1000 * (indent or 0)


def of_printf(text: Any, *_: Any, **__: Any) -> float:
    return math.inf if PRINTF_WIDTH.search(str(text)) else 0


def of_format(text: str, *_: Any, **__: Any) -> float:
    is_wide = any(FORMAT_WIDTH.search(spec or "") for _, _, spec, _ in Formatter().parse(text))
    return math.inf if is_wide else 0


def of_rounded(number: Any, precision: int = 0, *_: Any, **__: Any) -> float:
    return abs(precision)


Length = Callable[..., float]
FILTERS: dict[str, Length] = {
    **dict.fromkeys(("center", "batch", "slice"), of_width),
    **{"indent": of_indented, "replace": of_replaced, "join": of_items_joined},
    **{"tojson": of_json, "format": of_printf, "round": of_rounded},
}
METHODS: dict[str, Length] = {  # of texts
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), of_width),
    **{"expandtabs": of_tabs, "replace": of_replaced, "join": of_joined},
    **{"format": of_format, "format_map": of_format, "translate": lambda *_: math.inf},
}


def bounded(length: Length, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, after asking how long its result is; Jinja's own may get a context first."""
    has_context = hasattr(function, "jinja_pass_arg")

    def ask_first(*args: Any, **kwargs: Any) -> Any:
        first = [*args[:1]] if has_context else []
        given = [list(a) if hasattr(a, "__next__") else a for a in args[len(first) :]]
        require_length(length(*given, **kwargs))
        return function(*first, *given, **kwargs)

    ask_first.__dict__.update(getattr(function, "__dict__", {}))
    return ask_first


def bounded_method(method: Any) -> Any:
    """The method of a text likewise; anything else is as it was."""
    text = getattr(getattr(method, "__wrapped__", method), "__self__", None)
    length = METHODS.get(getattr(method, "__name__", ""))
    if not isinstance(text, str) or length is None:
        return method
    return bounded(lambda *args, **kwargs: length(text, *args, **kwargs), method)


def concatenated(parts: Iterable[Any]) -> str:
    """`~`, and what is printed by a template, a macro or a block."""
    texts, length = [], 0
    for part in parts:
        texts.append(str(part))
        length += len(texts[-1])
        require_length(length)
    return "".join(texts)


def operate(operator: str, left: Any, right: Any) -> Any:
    """+, * and % of numbers, texts and lists."""
    if operator == "+":
        if hasattr(left, "__len__") and hasattr(right, "__len__"):
            require_length(len(left) + len(right))
        return left + right
    if operator == "%":
        require_length(of_printf(left) if isinstance(left, str) else 0)
        return left % right
    a, b = (len(side) if hasattr(side, "__len__") else abs(side) for side in (left, right))
    if operator == "**" or a * b > MAX_LENGTH:
        raise jinja2.TemplateError(f"it takes a power, or a product beyond {MAX_LENGTH}")
    return left * right
