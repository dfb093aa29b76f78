"""Stream text while its tokens are generated.

All tokens so far are decoded together each time, and only new, complete characters are shown: a character can
take several tokens, a space can belong to the token after it, and some decoders drop the first space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

INCOMPLETE = "\ufffd"  # decoders write it for bytes that are not, or not yet, a character


def stream_text(tokens: Iterable[int], decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """Parts of decode(tokens), each as soon as its last character is complete; joined, they are all of it.

    Decoding again for every token takes quadratic time, which is small beside the model's.
    """
    so_far: list[int] = []
    text, num_shown = "", 0
    for token in tokens:
        so_far.append(token)
        text = decode(so_far)
        if len(text) > num_shown and not text.endswith(INCOMPLETE):
            yield text[num_shown:]
            num_shown = len(text)
    if len(text) > num_shown:
        yield text[num_shown:]
