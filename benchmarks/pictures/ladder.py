"""ladder.svg: the rungs of tests/lora_ladder as a stair, with the bugs planted at each."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from .svg import Picture

TESTS = Path(__file__).resolve().parents[2] / "tests" / "lora_ladder"
CATCHES = {  # rung -> bugs that it catches
    "platform": "a primitive that is only called float64; TF32",
    "op": "a wrong RoPE, attention mask, norm or kernel gradient",
    "layer": "alpha used for alpha / rank; a linear without adapter",
    "data": "the last batch dropped; every epoch in one order",
    "forward": "RoPE scaling or biases ignored; rows that mix",
    "loss": "padding or prompt counted; labels shifted twice",
    "gradient": "A without gradient; a detached input",
    "freezing": "a frozen weight that changes; an update lost",
    "step": "Adam without bias correction; schedule off by one",
    "trajectory": "gradients not reset; moments forgotten",
    "equivalences": "mean of means; state not captured by compile",
    "metamorphic": "token 0 taken for padding; wrong truncation",
    "state": "resume without moments, schedule or seed",
    "combinations": "a compiled step that keeps its first learning rate",
    "randomness": "a dropout mask that tokens share; A with another law",
    "options": "a setting dropped; checkpointing without effect",
    "merge": "merge without scale; unmerge that rounds",
    "files": "a transpose, a scale or a pattern lost in a file",
    "convergence": "right for a toy size only",
    "generation": "cache off by one; end of turn ignored",
}
RISE, RUN = 33, 17  # pixels of a step
LEFT, RIGHT, TOP = 16, 784, 113
BARS = 700  # x of the bars that count planted bugs


def rungs() -> dict[int, str]:
    """The numbers and names of the rungs, from the files of their tests."""
    names = (re.match(r"test_(\d\d)_([a-z]+)", path.name) for path in sorted(TESTS.iterdir()))
    return {int(found[1]): found[2] for found in names if found}


def planted() -> Counter[int]:
    """Rung -> number of planted bugs that it must catch first."""
    from tests.trainers.mutants import MUTANTS  # imports MLX

    return Counter(mutant.rung for mutant in MUTANTS.values())


def draw() -> str:
    names, counts = rungs(), planted()
    if list(names.values()) != list(CATCHES):
        raise ValueError(f"CATCHES must describe the rungs {list(names.values())}, got {list(CATCHES)}")
    total = sum(counts.values())
    steps = "; ".join(
        f"{rung} {name}, {counts[rung]} planted bugs: {CATCHES[name]}" for rung, name in names.items()
    )
    floor = TOP + RISE * len(names)
    picture = Picture(floor + 18, "The verification ladder", f"From the lowest rung to the highest: {steps}.")
    below = (
        "Climb from the bottom.",
        "A rung relies only on those below it,",
        "so the first that fails is the diagnosis.",
    )
    picture.heading("The verification ladder", below)
    picture.text(RIGHT, 28, f"{total} planted bugs", size=18, bold=True, color="orange", anchor="end")
    picture.text(RIGHT, 50, "each must be caught first at its own rung", color="muted", anchor="end")
    scale = (RIGHT - BARS - 24) / max(counts.values())
    for step, (rung, name) in enumerate(names.items()):
        top, x = floor - RISE * (step + 1), LEFT + RUN * step
        middle = top + RISE / 2 + 4.5
        picture.rect(x, top, RIGHT - x, RISE - 3, tint="blue", radius=3)
        picture.rect(x, top, 30, RISE - 3, fill="blue", radius=3)
        picture.text(x + 15, middle - 1, str(rung), bold=True, color="page", anchor="middle")
        picture.text(x + 40, middle - 1, name, bold=True)
        picture.text(x + 150, middle - 1, CATCHES[name], size=12, color="muted")
        if rung == 0:
            picture.text(BARS, middle - 1, "judges MLX", size=12, color="muted")
        if counts[rung]:
            width = scale * counts[rung]
            picture.rect(BARS, top + 9, width, RISE - 21, fill="orange", radius=2)
            picture.text(BARS + width + 5, middle - 1, str(counts[rung]), size=12, bold=True, color="orange")
    return str(picture)
