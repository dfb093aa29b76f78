"""HTML built from elements, so that every text in it is escaped."""

from __future__ import annotations

from html import escape

from .console import printable

VOID = ("meta", "path", "line")  # elements without content or an end


class Html(str):
    """Markup. Any other string is text, and is escaped where it becomes a part of an element."""


def text(value: object) -> Html:
    """The value as text: escaped, with U+FFFD for control characters and halves of surrogate pairs."""
    whole = str(value).encode("utf-8", "replace").decode("utf-8")
    return Html(escape(printable(whole)))


def element(name: str, /, *content: object, **attributes: object) -> Html:
    """`<name attribute="...">content</name>`; class_ is the attribute class, and `_` stands for `-`."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items()
    )
    if name in VOID:
        return Html(f"<{name}{given}>" if name == "meta" else f"<{name}{given}/>")
    return Html(f"<{name}{given}>{joined(content)}</{name}>")


def joined(parts: object) -> Html:
    """The parts one after the other; lists of parts are joined too."""
    if isinstance(parts, Html):
        return parts
    if isinstance(parts, (list, tuple)):
        return Html("".join(joined(part) for part in parts))
    return text(parts)
