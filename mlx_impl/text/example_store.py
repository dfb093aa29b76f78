"""Many examples in little memory: their tokens one after the other in an array, 4 bytes each, and a byte for
whether each is a target. As tuples, a token takes up to 36 bytes and a target 8.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import overload

from ..data import Example


class ExampleStore(Sequence[Example]):
    """A sequence of examples, made anew each time they are asked for. Only `append` changes it."""

    def __init__(self) -> None:
        self.tokens, self.targets = array("i"), bytearray()
        self.ends = array("q", [0])
        self.memo: dict[str, str] = {}  # what others have computed of all the examples

    def append(self, example: Example) -> None:
        self.tokens.extend(example.tokens)
        self.targets.extend(example.is_target)
        self.ends.append(len(self.tokens))
        self.memo.clear()

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # raises IndexError, and counts from the end
        return self.between(self.ends[number], self.ends[number + 1])

    def __iter__(self) -> Iterator[Example]:
        start = 0
        for end in self.ends[1:]:
            yield self.between(start, end)
            start = end

    def between(self, start: int, end: int) -> Example:
        return Example(tuple(self.tokens[start:end]), tuple(map(bool, self.targets[start:end])))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]
