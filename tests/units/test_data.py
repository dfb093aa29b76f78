"""Data: prompts are those of generation, and what cannot be trained on is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_impl.config import TrainConfig
from mlx_impl.data import (
    Example,
    make_batch,
    require_tokens,
    training_windows,
)
from mlx_impl.fast.kept_positions import target_positions
from mlx_impl.files.checkpoint import load_model
from mlx_impl.text.conversation import Conversation
from mlx_impl.text.examples import encode
from mlx_impl.text.tokenizer import ChatTokenizer
from tests.tiny_folder import write_folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> ChatTokenizer:
    return load_model(write_folder(tmp_path)).tokenizer


def chat(*contents: str) -> Conversation:
    roles = ("user", "assistant") * len(contents)
    messages = tuple({"role": r, "content": c} for r, c in zip(roles, contents, strict=False))
    return Conversation(messages, None, "data.jsonl:1")


def test_a_batch_without_a_target_still_has_the_smallest_shape() -> None:
    batch = make_batch([Example((5, 6, 7), (False,) * 3)])
    positions_N, targets_N, mask_N = target_positions(batch)
    assert len(positions_N) == len(targets_N) == len(mask_N) > 0
    assert not mask_N.any()


def test_the_prompt_of_training_is_the_prompt_of_generation(tokenizer: ChatTokenizer) -> None:
    conversation = chat("Hi?", "Yes.")
    example = encode(tokenizer, conversation, "completion")
    prompt = tokenizer.encode_prompt(conversation.messages[:-1])
    assert list(example.tokens[: len(prompt)]) == prompt
    assert not any(example.is_target[: len(prompt)])


def test_an_update_without_a_target_is_refused_and_its_examples_named() -> None:
    """Its mean would be 0 / 0."""
    bare = [Example((5, 6, 7), (False,) * 3)] * 2
    with pytest.raises(ValueError, match=r"needs at least one target, and the examples [12], [12] have none"):
        next(training_windows(bare, TrainConfig(iters=1)))


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    """MLX would read past the table, or from its end."""
    for token in (61, -1):
        with pytest.raises(ValueError, match="example 2: tokens must be at least 0 and less than 61"):
            require_tokens([Example((1, 2), (True,) * 2), Example((1, token), (True,) * 2)], 61)
