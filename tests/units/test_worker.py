"""A benchmark's contestant in its own process: one turn."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks import worker
from benchmarks.cases import CASES


class Orders:
    """A parent that gives these orders and keeps the answers."""

    def __init__(self, *orders: object) -> None:
        self.orders, self.answers = [*orders, None], list[object]()

    def recv(self) -> object:
        return self.orders.pop(0)

    def send(self, answer: object) -> None:
        self.answers.append(answer)


@pytest.mark.parametrize(("is_gpu", "untimed"), [(False, 0), (True, worker.UNTIMED_ON_A_GPU)])
def test_untimed_steps_precede_the_timed_one_on_a_gpu(
    is_gpu: bool, untimed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the last step of a turn is timed. The clock moves by each step's number."""
    steps: list[int] = []

    def step() -> float:
        steps.append(len(steps))
        return 0.5

    clock = SimpleNamespace(perf_counter=lambda: float(sum(steps)))
    monkeypatch.setattr(worker, "time", clock)
    monkeypatch.setattr(worker, "prepare", lambda environment: "a BLAS")
    monkeypatch.setattr(worker, "is_gpu", lambda: is_gpu)
    monkeypatch.setattr(worker, "on_its_arrays", lambda name, case: (SimpleNamespace(step=step), None, None))
    parent = Orders("step", "step")
    worker.answer_to(parent, "ours", CASES["tiny"], {})  # type: ignore[arg-type]
    assert parent.answers[1:] == [1 + untimed, 2 + 2 * untimed]
    assert len(steps) == 1 + 2 * (1 + untimed)


def test_several_steps_of_a_turn_are_timed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU after a few untimed ones, if asked for."""
    steps: list[int] = []
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: float(len(steps))))
    monkeypatch.setattr(worker, "prepare", lambda environment: "a BLAS")
    monkeypatch.setattr(worker, "is_gpu", lambda: True)
    step = SimpleNamespace(step=lambda: steps.append(0))
    monkeypatch.setattr(worker, "on_its_arrays", lambda name, case: (step, None, None))
    parent = Orders((3, False), (5, True))
    worker.answer_to(parent, "ours", CASES["tiny"], {})  # type: ignore[arg-type]
    assert parent.answers[1:] == [3, 5] and len(steps) == 1 + 3 + worker.UNTIMED_ON_A_GPU + 5
