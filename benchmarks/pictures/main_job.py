"""main_job.svg: the loss curve of the main job, and its answers before and after training.

`python -m mlx_impl train --adapter-path RUN` is the main job. `python -m benchmarks.pictures --run RUN` keeps
in main_job.json what the picture shows of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from textwrap import wrap
from typing import Any

from .svg import Picture

DATA = Path(__file__).with_name("main_job.json")
COMMAND = "python -m mlx_impl train --adapter-path RUN && python -m benchmarks.pictures --run RUN"
QUESTIONS = (
    "What is the capital of Paraguay?",
    "Which city serves as the capital of Bhutan?",
    "Liechtenstein: what's its capital?",
    "What is the capital of Australia?",
)
KINDS = {  # as in fixtures/geography -> in the picture
    "trained": "trained questions",
    "unseen": "unseen phrasings",
    "control": "control: known before",
}
LEFT, RIGHT, TOP, BOTTOM = 60, 396, 110, 310  # of the curve
MOST_NATS = 0.8
BARS, FULL = 500, 232  # x and length of a bar of 100%
COLUMNS = ((16, 36), (286, 34), (556, 31))  # of the answers: x and characters


def data_of(run: Path) -> dict[str, Any]:
    """The figures and answers of a run of the main job. Asks its adapter the QUESTIONS again."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    before = json.loads((run / "before.json").read_text(encoding="utf-8"))["answers"]
    steps = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    known = {
        answer["question"]: {"kind": kind, "expected": answer["expected"], "before": answer["text"]}
        for kind, answers in before.items()
        for answer in answers
    }
    return {
        "command": COMMAND,
        "batch_loss_nats": [round(step["loss_nats"], 4) for step in steps],
        "validation_nats": [round(report[name], 4) for name in ("valid_loss_first", "valid_loss_last")],
        "questions": {kind: len(answers) for kind, answers in before.items()},
        "right": {kind: [report[f"{kind}_{when}"] for when in ("before", "after")] for kind in before},
        "answers": [{"question": q, **known[q], "after": answer_of(run, q)} for q in QUESTIONS],
    }


def answer_of(run: Path, question: str) -> str:
    command = [sys.executable, "-m", "mlx_impl", "generate", "--adapter-path", str(run), "--json"]
    done = subprocess.run([*command, "--prompt", question], check=True, capture_output=True, text=True)
    text: str = json.loads(done.stdout)["text"]
    return text


def write_data(run: Path) -> None:
    text = json.dumps(data_of(run), indent=1, ensure_ascii=False)
    DATA.write_text(text + "\n", encoding="utf-8")


def draw_curve(picture: Picture, data: dict[str, Any]) -> None:
    losses: list[float] = data["batch_loss_nats"]
    first, last = data["validation_nats"]

    def place(step: float, nats: float) -> tuple[float, float]:
        x = LEFT + (RIGHT - LEFT) * step / len(losses)
        return x, BOTTOM - (BOTTOM - TOP) * nats / MOST_NATS

    picture.text(16, TOP - 18, "loss, nats per target token", bold=True)
    for nats in (0.0, 0.2, 0.4, 0.6, 0.8):
        _, y = place(0, nats)
        picture.line([(LEFT, y), (RIGHT, y)], "line", weight=1)
        picture.text(LEFT - 8, y + 4, f"{nats:.1f}", size=12, color="muted", anchor="end")
    for step in range(0, len(losses) + 1, 10):
        picture.text(place(step, 0)[0], BOTTOM + 18, str(step), size=12, color="muted", anchor="middle")
    picture.text((LEFT + RIGHT) / 2, BOTTOM + 37, "optimizer update", size=12, color="muted", anchor="middle")
    picture.line([place(step, nats) for step, nats in enumerate(losses, 1)], "blue", weight=2.2)
    picture.text(
        place(11, 0)[0], place(0, 0.47)[1], "training batches of 4", size=12, bold=True, color="blue"
    )
    for step, nats in ((0, first), (len(losses), last)):
        picture.dot(*place(step, nats), 5, "orange")
    picture.text(
        place(2, 0)[0], place(0, first)[1] + 16, f"validation {first:.2f}", size=12, bold=True, color="orange"
    )
    words = f"validation {last:.3f}"
    picture.text(RIGHT, place(0, last)[1] - 24, words, size=12, bold=True, color="orange", anchor="end")


def draw_shares(picture: Picture, data: dict[str, Any]) -> None:
    """Right answers before and after, per kind of question."""
    x = 432
    picture.text(x, TOP - 18, "right answers", bold=True)
    for group, (kind, words) in enumerate(KINDS.items()):
        y = TOP + 10 + 72 * group
        picture.text(x, y, f"{words} ({data['questions'][kind]})")
        for row, (when, share) in enumerate(zip(("before", "after"), data["right"][kind], strict=True)):
            color, top = ("gray", "green")[row], y + 9 + 21 * row
            picture.text(BARS - 10, top + 12, when, size=12, color="muted", anchor="end")
            picture.rect(BARS, top, FULL, 15, stroke="line", radius=2, weight=1)
            if share:
                picture.rect(BARS, top, FULL * share, 15, fill=color, radius=2)
            picture.text(BARS + FULL + 8, top + 12, f"{share:.0%}", size=12, bold=row == 1)


def mark(picture: Picture, x: float, y: float, is_right: bool) -> None:
    """A check mark or a cross whose text begins at x + 18."""
    if is_right:
        picture.line([(x, y - 5), (x + 4, y - 1), (x + 11, y - 10)], "green", weight=2.4)
    else:
        for start, end in ((y - 10, y), (y, y - 10)):
            picture.line([(x + 1, start), (x + 11, end)], "red", weight=2.4)


def draw_answers(picture: Picture, data: dict[str, Any], y: float) -> float:
    """The questions with both answers; returns the y below them."""
    for (x, _), words in zip(COLUMNS, ("question", "answer before", "answer after"), strict=True):
        picture.text(x, y, words, size=12, color="muted")
    y += 8
    for answer in data["answers"]:
        picture.line([(16, y), (784, y)], "line", weight=1)
        cells = [answer[name] for name in ("question", "before", "after")]
        columns = [wrap(cell, width) for cell, (_, width) in zip(cells, COLUMNS, strict=True)]
        columns[0].append(answer["kind"])
        for number, (lines, (x, _)) in enumerate(zip(columns, COLUMNS, strict=True)):
            if number:
                mark(picture, x, y + 20, answer["expected"].lower() in cells[number].lower())
            for row, line in enumerate(lines):
                color = "muted" if number == 0 and row == len(lines) - 1 else "ink"
                picture.text(x + 18 * bool(number), y + 20 + 17 * row, line, size=12, color=color)
        y += 12 + 17 * max(map(len, columns))
    return y


def draw() -> str:
    data = json.loads(DATA.read_text(encoding="utf-8"))
    first, last = data["validation_nats"]
    shares = "; ".join(f"{KINDS[kind]} {a:.0%} and {b:.0%}" for kind, (a, b) in data["right"].items())
    picture = Picture(
        0,  # set below, from the answers' lengths
        "The main job, before and after",
        f"The validation loss falls from {first} to {last} nats per target token. "
        f"Right answers before and after training: {shares}.",
    )
    below = "python -m mlx_impl train: SmolLM2-135M learns forty capitals in 50 updates on a CPU"
    picture.heading("The main job, before and after", [below])
    draw_curve(picture, data)
    draw_shares(picture, data)
    picture.height = draw_answers(picture, data, BOTTOM + 76) + 8
    return str(picture)
