"""What a terminal shows while a trainer climbs: each rung as it is done, and how far the present one is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
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

    def pytest_runtest_logfinish(self, location: tuple[str, int | None, str]) -> None:
        rung = int(Path(location[0]).name.split("_")[1])
        self.left[rung] -= 1
        assert self.ladder is not None
        if not self.left[rung]:
            self.show(rung_line(self.ladder, rung) + "\n")
        elif self.screen.isatty():
            title = self.ladder.titles.get(rung, "")
            self.show(f"{rung:>4} {title:<14} {self.total[rung] - self.left[rung]} of {self.total[rung]}")

    def show(self, text: str) -> None:
        self.screen.write(TO_START * self.screen.isatty() + text)
        self.screen.flush()
