"""The answers before and after training, as tables of report.html."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .markup import Html, element

OPEN_ROWS, MAX_ROWS = 8, 200  # of a table: shown at once, and shown at all
TITLES = {
    "trained": "Questions of the training data",
    "unseen": "Questions of the test data, not trained",
    "control": "Control questions: what should not be forgotten",
    "sample": "Samples of the held-out data",
}


def answer_sections(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[tuple[str, list[Html]]]:
    """A title and its content for each group of questions."""
    for name, rows in groups.items():
        parts = [answer_table(rows[:OPEN_ROWS])]
        if len(rows) > OPEN_ROWS:
            rest = element("summary", f"{len(rows) - OPEN_ROWS} more")
            parts.append(element("details", rest, answer_table(rows[OPEN_ROWS:MAX_ROWS])))
        if len(rows) > MAX_ROWS:
            parts.append(element("p", f"{len(rows) - MAX_ROWS} more are in report.json", class_="muted"))
        yield TITLES.get(name, name), parts


def answer_table(rows: Sequence[Mapping[str, Any]]) -> Html:
    wanted = "expected" if rows[0]["expected"] is not None else "the data's reply"
    titles = ("question", wanted, "before", "after")
    head = element("tr", [element("th", title, scope="col") for title in titles])
    body = element("tbody", [answer_row(row, titles) for row in rows])
    return element("table", element("thead", head), body, class_="answers")


def answer_row(row: Mapping[str, Any], titles: Sequence[str]) -> Html:
    return element(
        "tr",
        cell(titles[0], row["question"]),
        cell(titles[1], row["reply"] if row["expected"] is None else row["expected"]),
        cell(titles[2], row["before"], row["verdict_before"]),
        cell(titles[3], row["after"], row["verdict_after"]),
    )


def cell(title: str, content: str, verdict: str = "") -> Html:
    """On a phone the title stands above the content, because the rows become blocks."""
    badge = element("b", verdict, class_=f"badge {verdict}") if verdict else ""
    end = " \u2026" if verdict == "cut" else ""
    return element("td", badge, element("span", content, end), data_title=title, dir="auto")
