"""The chat templates of the `trl` package: text as transformers renders it, and targets within its masks.

The package is not imported: only its template files are read. Without it these tests are skipped.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mlx_impl.text.columns import to_conversation
from mlx_impl.text.examples import encode
from mlx_impl.text.tokenizer import ChatTokenizer
from tests.peers.published_conversations import CONVERSATIONS
from tests.units.test_examples import byte_level

SPEC = importlib.util.find_spec("trl")
FILES = sorted((Path(SPEC.origin).parent / "chat_templates").glob("*.jinja")) if SPEC and SPEC.origin else []
MASKED = [file for file in FILES if "generation %}" in file.read_text(encoding="utf-8")]
BAR = "\uff5c"  # DeepSeek's, of full width
ENDS = [  # what ends a turn in these templates
    *("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<turn|>", "<|END_OF_TURN_TOKEN|>"),
    *("<|return|>", "<|call|>", f"<{BAR}end\u2581of\u2581sentence{BAR}>", "<end_of_utterance>"),
    *("<|end_of_text|>", "<|endoftext|>", "<|user|>", "<|observation|>", "<eos>"),
]
# What transformers' masks mark beside ours: the prompt's end, with the start of thinking, which generation
# does not produce; white space and EOS after the end of a turn; between two messages of one reply.
HEADS = (
    *("<|start|>assistant", f"<{BAR}Assistant{BAR}>", "<|turn>model"),
    *("<think>", "</think>", "<|end|>", "</s>"),
)
GENERATED = ("<|tool_response>", "<|turn>model\n")  # Gemma's, which its prompt leaves to the model
NEED_IMAGES = ("smolvlm_training", "idefics3_training", "llava_next_training")  # they show no plain text

pytestmark = pytest.mark.skipif(not FILES, reason="the package trl is not installed")


def tokenizer() -> Tokenizer:
    made = byte_level()
    made.add_special_tokens(ENDS)
    return made


def pair(file: Path) -> tuple[PreTrainedTokenizerFast, ChatTokenizer]:
    """transformers' tokenizer and ours, with this template."""
    source = file.read_text(encoding="utf-8")
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), bos_token="<s>", eos_token="</s>")
    theirs.chat_template = source
    return theirs, ChatTokenizer(tokenizer(), source, "</s>", "<s>")


def with_joined_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Content that is a list of text parts as one text, as a data file is read here."""
    texts = [
        m["content"] if isinstance(m["content"], str) else "".join(part["text"] for part in m["content"])
        for m in messages
    ]
    return [m | {"content": text} for m, text in zip(messages, texts, strict=True)]


def theirs_or_none(theirs: PreTrainedTokenizerFast, row: dict[str, Any], **how: Any) -> Any:
    """What transformers makes of the row; None where the template refuses it."""
    try:
        messages = with_joined_parts(row["messages"])
        return theirs.apply_chat_template(messages, tools=row.get("tools"), **how)
    except Exception:  # of Jinja, or of the template
        return None


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_row_is_rendered_as_by_transformers_or_refused_by_both(file: Path) -> None:
    """A call's arguments that a template joins to a text are given as JSON; transformers fails there."""
    theirs, ours = pair(file)
    for name, row in CONVERSATIONS.items():
        messages = to_conversation(row, "data.jsonl:1", {})[0].messages
        for prompt in (False, True):
            expected = theirs_or_none(theirs, row, add_generation_prompt=prompt, tokenize=False)
            try:
                text = ours.render(messages, prompt, row.get("tools"))
            except ValueError:
                assert expected is None, name
            else:
                assert text == expected or (expected is None and '{"city": "Oslo", "days": 2}' in text), name


def surplus(one: Sequence[int], other: Sequence[int], tokens: Sequence[int]) -> Iterator[list[int]]:
    """The runs of tokens that only the first of two masks marks."""
    marks = zip(one, other, tokens, strict=True)
    for is_only_one, run in groupby(marks, lambda mark: bool(mark[0]) and not mark[1]):
        if is_only_one:
            yield [token for *_, token in run]


@pytest.mark.parametrize("file", MASKED, ids=lambda file: file.stem)
def test_targets_are_those_of_the_templates_mask_without_the_prompts_end(file: Path) -> None:
    """Of the mask only heads and what follows an end are no targets, and nothing beside it is a target."""
    theirs, ours = pair(file)
    how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    compared = 0
    for name, row in CONVERSATIONS.items():
        expected = theirs_or_none(theirs, row, **how)
        try:
            example = encode(ours, to_conversation(row, "data.jsonl:1", {})[0], "assistant")
        except ValueError as error:
            assert "the chat template must show" in str(error) or expected is None, name
            continue
        if expected is None:
            continue
        tokens, mask = expected["input_ids"], expected["assistant_masks"]
        n = len(example.tokens) - (list(example.tokens) != tokens[: len(example.tokens)])  # less our EOS
        assert list(example.tokens[:n]) == tokens[:n], name
        is_target = [*example.is_target[:n]] + [False] * (len(tokens) - n)
        ours_alone = [theirs.decode(run) for run in surplus(is_target, mask, tokens)]
        # transformers takes of the last character the first byte's token alone
        assert all(text in GENERATED or not text.strip("\ufffd") for text in ours_alone), (name, ours_alone)
        for run in surplus(mask, is_target, tokens):
            text = theirs.decode(run)
            for head in HEADS:
                text = text.replace(head, "")
            assert not text.strip(), (name, theirs.decode(run))
        compared += 1
    assert compared or file.stem in NEED_IMAGES, "nothing was compared"
