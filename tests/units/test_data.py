"""Data: each example once an epoch, each target marked where the text says so, each bad line named."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mlx_impl.config import TrainConfig
from mlx_impl.data import (
    Example,
    evaluation_batches,
    make_batch,
    require_tokens,
    training_windows,
)
from mlx_impl.fast.kept_positions import target_positions
from mlx_impl.files.checkpoint import load_model
from mlx_impl.text.examples import encode
from mlx_impl.text.rows import Conversation
from mlx_impl.text.tokenizer import ChatTokenizer
from tests.tiny_folder import write_folder

EXAMPLES = [Example((n,) * (n + 2), (False,) + (True,) * (n + 1)) for n in range(1, 8)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> ChatTokenizer:
    return load_model(write_folder(tmp_path)).tokenizer


def chat(*contents: str) -> Conversation:
    roles = ("user", "assistant") * len(contents)
    messages = tuple({"role": r, "content": c} for r, c in zip(roles, contents, strict=False))
    return Conversation(messages, None, "data.jsonl:1")


def test_position_t_predicts_token_t_plus_1() -> None:
    """By hand: prompt 5 6, answer 7 8; the last prompt token predicts the first of the answer."""
    batch = make_batch([Example((5, 6, 7, 8), (False, False, True, True))])
    assert batch.inputs_BT[0, :3].tolist() == [5, 6, 7]
    assert batch.targets_BT[0, :3].tolist() == [6, 7, 8]
    assert batch.mask_BT[0].tolist() == [False, True, True] + [False] * (batch.mask_BT.shape[1] - 3)
    assert batch.num_tokens == 3


def test_a_longer_neighbour_leaves_a_rows_targets_as_they_are() -> None:
    """It widens the batch, and that is all."""
    short = Example((3, 1, 4), (False, True, True))
    long = Example(tuple(range(1, 30)), (True,) * 29)
    alone, beside = make_batch([short]), make_batch([short, long])
    assert alone.mask_BT[0].sum() == beside.mask_BT[0].sum() == 2
    assert beside.targets_BT[0][beside.mask_BT[0]].tolist() == [1, 4]


def test_every_example_is_seen_once_an_epoch_also_the_last_few() -> None:
    """Seven examples by three: three batches an epoch, the last of one."""
    windows = list(training_windows(EXAMPLES, TrainConfig(iters=6, batch_size=3)))
    for epoch in (windows[:3], windows[3:]):
        seen = Counter(int(row[0]) for window in epoch for batch in window for row in batch.inputs_BT)
        assert seen == Counter(range(1, 8))


def test_the_last_window_of_an_epoch_has_what_is_left() -> None:
    """Seven examples by two, two batches an update: 2 + 2, then 2 + 1; each knows which examples it has."""
    config = TrainConfig(iters=4, batch_size=2, grad_accumulation_steps=2)
    windows = list(training_windows(EXAMPLES, config))
    assert [[len(batch.inputs_BT) for batch in window] for window in windows] == [[2, 2], [2, 1]] * 2
    for batch in windows[1]:
        assert [number + 1 for number in batch.numbers] == batch.inputs_BT[:, 0].tolist()
    assert sorted(n for window in windows[:2] for batch in window for n in batch.numbers) == list(range(7))


def test_a_run_taken_up_in_the_middle_sees_the_same_windows() -> None:
    config = TrainConfig(iters=9, batch_size=2, grad_accumulation_steps=2, data_seed=5)
    whole = [[b.numbers for b in window] for window in training_windows(EXAMPLES, config)]
    rest = [[b.numbers for b in window] for window in training_windows(EXAMPLES, config, first_step=4)]
    assert rest == whole[4:]


def test_a_batch_without_a_target_still_has_the_smallest_shape() -> None:
    batch = make_batch([Example((5, 6, 7), (False,) * 3)])
    positions_N, targets_N, mask_N = target_positions(batch)
    assert len(positions_N) == len(targets_N) == len(mask_N) > 0
    assert not mask_N.any()


def test_the_order_differs_between_epochs_and_seeds_and_repeats_with_the_seed() -> None:
    def order(seed: int) -> list[int]:
        windows = training_windows(EXAMPLES, TrainConfig(iters=14, batch_size=1, data_seed=seed))
        return [int(batch.inputs_BT[0, 0]) for (batch,) in windows]

    assert order(0) == order(0) != order(1)
    assert order(0)[:7] != order(0)[7:]


def test_a_data_set_smaller_than_a_batch_is_trained() -> None:
    ((batch,),) = training_windows(EXAMPLES[:2], TrainConfig(iters=1, batch_size=4))
    assert len(batch.inputs_BT) == 2


def test_evaluation_sees_every_target_once_at_any_batch_size() -> None:
    counts = [
        sum(int(batch.mask_BT.sum()) for batch in evaluation_batches(EXAMPLES, size)) for size in (1, 3, 8)
    ]
    assert counts == [sum(range(2, 9))] * 3


def test_the_targets_are_the_reply_up_to_the_end_of_turn_token(tokenizer: ChatTokenizer) -> None:
    """The newline that the template prints after it is none, nor is anything of the prompt."""
    example = encode(tokenizer, chat("Hi?", "Yes."), "completion")
    targets = [t for t, is_target in zip(example.tokens, example.is_target, strict=True) if is_target]
    assert targets == tokenizer.encode("Yes.<|im_end|>")
    assert example.tokens[-1] == tokenizer.eos_id


def test_without_masking_every_token_is_a_target(tokenizer: ChatTokenizer) -> None:
    masked = encode(tokenizer, chat("Hi?", "Yes."), "completion")
    whole = encode(tokenizer, chat("Hi?", "Yes."), "all")
    assert whole.tokens == masked.tokens
    assert all(whole.is_target)


def test_of_several_turns_the_last_reply_is_the_target(tokenizer: ChatTokenizer) -> None:
    example = encode(tokenizer, chat("a", "b", "c", "d"), "completion")
    assert sum(example.is_target) == len(tokenizer.encode("d<|im_end|>"))


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
