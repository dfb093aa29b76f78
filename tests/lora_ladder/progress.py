"""What a screen shows while a trainer climbs: each rung once done; on a terminal, the claim now judged."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from shutil import get_terminal_size
from typing import TextIO

import pytest

from tests.lora_ladder.plugin import Ladder, rung_of
from tests.lora_ladder.summary import rung_line

TO_START = "\r\x1b[K"  # clears the line, on a terminal


class Progress:
    """A pytest plugin that writes to `screen`, which must not be captured between claims."""

    def __init__(self, screen: TextIO) -> None:
        self.screen = screen
        self.left: Counter[int] = Counter()
        self.total: Counter[int] = Counter()
        self.ladder: Ladder | None = None

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.ladder = session.config.pluginmanager.get_plugin("ladder")
        self.left = Counter(rung for item in session.items if (rung := rung_of(item.path)) is not None)
        self.total = self.left.copy()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """The claim that is judged now, in a line of the terminal that the next one replaces."""
        if not self.screen.isatty():
            return
        file, _, claim = nodeid.rpartition("/")[2].partition("::")
        rung, title = int(file.split("_")[1]), Path(file).stem.split("_")[2]
        number, total = self.total[rung] - self.left[rung] + 1, self.total[rung]
        line = f"{rung:>4} {title:<14} {number} of {total}: {claim}"
        self.show(line[: get_terminal_size().columns - 1])

    def pytest_keyboard_interrupt(self) -> None:
        """The rungs that were begun, each with what was judged of it."""
        if self.ladder is not None:
            for rung in sorted(rung for rung in self.ladder.outcomes if self.left[rung]):
                self.show(rung_line(self.ladder, rung) + "\n")

    def pytest_runtest_logfinish(self, location: tuple[str, int | None, str]) -> None:
        rung = int(Path(location[0]).name.split("_")[1])
        self.left[rung] -= 1
        assert self.ladder is not None
        if not self.left[rung]:
            self.show(rung_line(self.ladder, rung) + "\n")

    def show(self, text: str) -> None:
        self.screen.write(TO_START * self.screen.isatty() + text)
        self.screen.flush()
