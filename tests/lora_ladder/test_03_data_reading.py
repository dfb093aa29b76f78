"""Rung 3, data: a data file, a tokenizer and a chat template become examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.lora_ladder.cases import Case
from tests.lora_ladder.chat import chat, example_of, write_lines, write_tokenizer
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.protocol import Arrays

needs_reading = pytest.mark.needs("read_examples")
TWO_TURNS = chat("Hi, é?", "Yes.", "a", "d d", system="Be brief.")
# template, targets, line of the data file -> its example by hand, targets between « and »
READ = {
    "the last reply": (
        ("chatml", "completion", TWO_TURNS),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi, é?<|im_end|>\n<|im_start|>assistant\n"
        "Yes.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«d d<|im_end|>»",
    ),
    "every reply": (
        ("chatml", "assistant", TWO_TURNS),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi, é?<|im_end|>\n<|im_start|>assistant\n"
        "«Yes.<|im_end|>»\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«d d<|im_end|>»",
    ),
    "every token": (
        ("chatml", "all", chat("a", "b")),
        "«<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>»",
    ),
    "an empty reply": (
        ("chatml", "assistant", chat("a", "", "b", "c")),
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«<|im_end|>»\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n«c<|im_end|>»",
    ),
    "a reply that repeats the question": (
        ("chatml", "completion", chat("user", "user")),
        "<|im_start|>user\nuser<|im_end|>\n<|im_start|>assistant\n«user<|im_end|>»",
    ),
    "prompt and completion": (
        ("chatml", "completion", {"prompt": "a", "completion": "😀\n"}),
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«😀\n<|im_end|>»",
    ),
    "a text": (("chatml", "completion", {"text": "One two."}), "«One two.<|im_end|>»"),
    "every reply, another template": (
        ("mistral", "assistant", chat("a", "bc", "d", "e")),
        "<s>[INST] a [/INST]«bc</s>»[INST] d [/INST]«e</s>»",
    ),
    "a template without an end of turn": (
        ("no end of turn", "assistant", chat("a", "bc", "d", "e")),
        "user: a\nassistant: «bc»\nuser: d\nassistant: «e</s>»",
    ),
}
UNLIMITED = 2048


@needs_reading
@pytest.mark.parametrize("name", READ)
def test_the_targets_are_the_replies_to_their_end_of_turn_token(
    case: Case, candidate: Any, judge: Judge, name: str, tmp_path: Path
) -> None:
    """Nothing of a prompt, and not what the template prints after the end of a turn."""
    (template, targets, row), marked = READ[name]
    file = write_lines(tmp_path, [row])
    ours = case.build(candidate).read_examples(write_tokenizer(tmp_path, template), file, targets, UNLIMITED)
    judge.same_bits(by_number(ours), by_number([example_of(marked)]))


def by_number(examples: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Arrays:
    return {
        f"{what} of example {number}": np.array(values, dtype=int)
        for number, example in enumerate(examples, 1)
        for what, values in zip(("tokens", "flags"), example, strict=True)
    }


@needs_reading
def test_every_line_is_an_example_in_the_order_of_the_file(
    case: Case, candidate: Any, judge: Judge, tmp_path: Path
) -> None:
    """Of whatever shape, and also one that stands there twice."""
    rows = [chat("a", "b"), {"text": "c"}, chat("a", "b"), chat("d", "e"), {"prompt": "f", "completion": "g"}]
    pairs = [("a", "b"), None, ("a", "b"), ("d", "e"), ("f", "g")]
    marked = [
        f"<|im_start|>user\n{pair[0]}<|im_end|>\n<|im_start|>assistant\n«{pair[1]}<|im_end|>»"
        if pair
        else "«c<|im_end|>»"
        for pair in pairs
    ]
    file = write_lines(tmp_path, rows)
    ours = case.build(candidate).read_examples(
        write_tokenizer(tmp_path, "chatml"), file, "completion", UNLIMITED
    )
    judge.same_bits(by_number(ours), by_number(list(map(example_of, marked))))


@needs_reading
def test_an_example_keeps_its_beginning_up_to_the_maximum_length(
    case: Case, candidate: Any, judge: Judge, tmp_path: Path
) -> None:
    """One that just fits is whole; one that has no target within the maximum is left out."""
    whole = example_of("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«bcdef<|im_end|>»")
    file, maximum = write_lines(tmp_path, [chat("a", "bcdef"), chat("a" * 30, "b")]), len(whole[0])
    folder = write_tokenizer(tmp_path, "chatml")
    for length in (maximum, maximum - 1, maximum - 3):
        ours = case.build(candidate).read_examples(folder, file, "completion", length)
        judge.same_bits(by_number(ours), by_number([(whole[0][:length], whole[1][:length])]))
