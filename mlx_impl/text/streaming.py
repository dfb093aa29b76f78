"""Text as its tokens come.

A character can take several tokens, a space can belong to the token after it, and a decoder may drop the
first space of a text: so the tokens are decoded together each time, and what is new and whole is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character, or not yet


def pieces(tokens: Iterable[int], decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """Parts of decode(tokens), each as soon as its last character is whole; joined they are all of it.

    Decoding anew for every token is quadratic, but cheap beside the model.
    """
    seen: list[int] = []
    text, num_shown = "", 0
    for token in tokens:
        seen.append(token)
        text = decode(seen)
        if len(text) > num_shown and not text.endswith(UNFINISHED):
            yield text[num_shown:]
            num_shown = len(text)
    if len(text) > num_shown:
        yield text[num_shown:]
