"""Ctrl-C while ranks train is never lost, and leaves nothing behind."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator
from typing import Any, cast

import mlx.core as mx
import pytest

from mlx_impl.data import Window
from mlx_impl.model import CausalLM
from mlx_impl.run.guard import NotFinite
from mlx_impl.run.interrupts import stopping_together
from mlx_impl.run.ranks import Ranks
from mlx_impl.run.trainer import LoRATrainer
from tests.tiny_model import TINY_LLAMA
from tests.units.rank_program import LORA, TRAINING, examples

Records = Iterator[Any]


class OneRank:
    """It agrees with itself, and counts how often it was asked."""

    num_asked = 0

    def largest(self, number: int) -> int:
        self.num_asked += 1
        return number


def together(records: Iterable[Any], ranks: OneRank | None = None) -> Records:
    return stopping_together(cast(Ranks, ranks or OneRank()), records)


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def python_s_handler() -> Iterator[None]:
    """That of a program which a shell starts in the foreground; it must be there again after the test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def is_interrupted_within(seconds: float) -> bool:
    try:
        time.sleep(seconds)
    except KeyboardInterrupt:
        return True
    return False


def test_ctrl_c_before_a_break_is_raised_after_the_loop() -> None:
    for _ in together(range(5)):
        ctrl_c()
        break
    assert is_interrupted_within(10)


def test_ctrl_c_before_a_break_is_raised_after_the_loop_over_fit() -> None:
    """Generators within generators, none of which was closed by name."""
    with Ranks(mx.distributed.init()) as ranks:
        for _ in LoRATrainer(CausalLM(TINY_LLAMA), LORA, TRAINING, ranks=ranks).fit(examples(5)):
            ctrl_c()
            break
        assert is_interrupted_within(10)


def test_ctrl_c_after_the_last_check_is_raised_at_the_end_of_the_records() -> None:
    def records() -> Records:
        yield 1
        ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        list(together(records()))
    assert not is_interrupted_within(0.3)


def test_ctrl_c_beside_a_kept_iterator_is_raised_when_it_is_closed() -> None:
    kept = together(range(5))
    next(kept)
    ctrl_c()
    del kept
    assert is_interrupted_within(10)


def test_ctrl_c_beside_a_kept_iterator_ends_the_next_training() -> None:
    kept = together(range(5))
    next(kept)
    ctrl_c()
    again = together(range(5))
    assert next(again) == 0
    with pytest.raises(KeyboardInterrupt):
        next(again)
    kept.close()  # type: ignore[attr-defined]
    assert not is_interrupted_within(0.3)


def test_a_handler_that_came_later_stays() -> None:
    kept = together(range(5))
    next(kept)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    del kept
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is signal.SIG_IGN


def test_a_second_ctrl_c_raises_at_once_and_no_third_time() -> None:
    with pytest.raises(KeyboardInterrupt):
        for _ in together(range(5)):
            ctrl_c()
            ctrl_c()
            raise AssertionError
    assert not is_interrupted_within(0.3)


def test_an_error_of_the_training_goes_before_ctrl_c() -> None:
    def records() -> Records:
        yield 1
        ctrl_c()
        raise NotFinite("", 0)

    with pytest.raises(NotFinite):
        list(together(records()))
    assert not is_interrupted_within(0.3)


def test_ranks_ask_one_another_after_every_update_unless_all_have_a_handler_of_their_own() -> None:
    """`train --distributed` has one, and asks for itself: a message an update is enough."""
    ranks = OneRank()
    assert list(together(range(5), ranks)) == [*range(5)] and ranks.num_asked == 6
    before = signal.signal(signal.SIGINT, lambda *_: None)
    ranks = OneRank()
    assert list(together(range(5), ranks)) == [*range(5)] and ranks.num_asked == 1
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, NotFinite])
def test_the_memory_limit_is_lifted_when_the_program_handles_what_ended_the_training(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """It may save or evaluate there, while the exception still holds what it came through."""
    ended: list[bool] = []

    def paced(windows: Iterable[Window], *_: Any) -> Iterator[Window]:
        try:
            yield from windows
        finally:
            ended.append(True)

    monkeypatch.setattr("mlx_impl.run.trainer.paced", paced)
    with Ranks(mx.distributed.init()) as ranks:
        trainer = LoRATrainer(CausalLM(TINY_LLAMA), LORA, TRAINING, ranks=ranks)
        if error is NotFinite:
            monkeypatch.setattr(trainer.guard, "check", not_finite)
        with pytest.raises(error) as caught:
            for _ in trainer.fit(examples(5)):
                assert not ended
                ctrl_c()
        assert caught.traceback and ended == [True]


def not_finite(*_: Any) -> None:
    raise NotFinite("", 0)
