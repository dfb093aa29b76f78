"""The watchdog of a rank: what it takes for a lost one, and that it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from mlx_impl.run.watchdog import EXIT_LOST, PATIENCE, Watchdog

STOPPED = 128 + signal.SIGINT


@pytest.fixture
def dog() -> Watchdog:
    """It watches nothing: the times are given."""
    dog = Watchdog("rank 0", timeout=600.0)
    dog.close()
    return dog


def code(dog: Watchdog, now: float) -> int | None:
    found = dog.verdict(now)
    return None if found is None else found[1]


def test_a_wait_ends_at_the_time_out(dog: Watchdog) -> None:
    dog.begin_wait(1000.0)
    assert [code(dog, now) for now in (1000.0, 1600.0, 1600.1)] == [None, None, EXIT_LOST]
    dog.end_wait(1600.2)
    assert code(dog, 9000.0) is None


def test_after_a_signal_a_wait_ends_when_patience_does(dog: Watchdog) -> None:
    """Counted from the signal, or from the wait where that begins later."""
    dog.begin_wait(dog.waited)
    start, dog.signalled = dog.waited, (signal.SIGINT, dog.waited + 2)
    assert [code(dog, start + 2 + s) for s in (0, PATIENCE - 0.1, PATIENCE + 0.1)] == [None, None, STOPPED]
    dog.end_wait(start + 3)
    dog.begin_wait(start + 4)
    assert [code(dog, start + 4 + s) for s in (PATIENCE - 0.1, PATIENCE + 0.1)] == [None, STOPPED]


@pytest.mark.parametrize("is_own", [True, False], ids=["own part", "others' part"])
def test_patience_is_twice_the_longest_part_of_any_rank(dog: Watchdog, is_own: bool) -> None:
    """A rank whose step takes 40 s is not lost after 10."""
    start = dog.waited
    dog.begin_wait(start + (40 if is_own else 0))
    dog.end_wait(start + 40)
    dog.signalled = signal.SIGINT, start + 40
    dog.begin_wait(start + 40)
    assert [code(dog, start + 40 + s) for s in (PATIENCE + 1, 79, 81)] == [None, None, STOPPED]


def test_patience_does_not_exceed_the_time_out(dog: Watchdog) -> None:
    start = dog.waited
    dog.begin_wait(start + 500)
    dog.end_wait(start + 500)
    dog.signalled = signal.SIGINT, start + 500
    dog.begin_wait(start + 500)
    assert [code(dog, start + 500 + s) for s in (599, 601)] == [None, STOPPED]


def test_a_signal_is_forgotten_where_the_program_trains_again(dog: Watchdog) -> None:
    """Not where it trains for the first time: it may have been told to stop before."""
    dog.signalled = signal.SIGINT, 0.0
    dog.begin_training()
    assert dog.signalled is not None
    dog.begin_training()
    assert dog.signalled is None


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def wake_up_fd() -> int:
    found = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(found, warn_on_full_buffer=False)
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts the files in /proc")
def test_a_closed_one_leaves_no_thread_no_file_and_the_wake_up_fd_as_it_was() -> None:
    before = threading.active_count(), open_files(), wake_up_fd()
    dogs = [Watchdog(f"rank {number}", 600.0) for number in range(3)]
    assert threading.active_count() == before[0] + 6
    for dog in reversed(dogs):
        dog.close()
        dog.close()
    assert (threading.active_count(), open_files(), wake_up_fd()) == before


def test_only_the_main_thread_closes_what_it_made() -> None:
    """It alone may give back the wake-up file descriptor, so nothing is ended before."""
    dog, refused = Watchdog("rank 0", 600.0), list[str]()

    def close() -> None:
        try:
            dog.close()
        except RuntimeError as error:
            refused.append(str(error))

    def in_another_thread() -> list[str]:
        refused.clear()
        thread = threading.Thread(target=close)
        thread.start()
        thread.join()
        return refused

    before = threading.active_count(), wake_up_fd()
    assert in_another_thread() == ["only the main thread can close the ranks that it has joined"]
    assert (threading.active_count(), wake_up_fd()) == before and not dog.closed.is_set()
    dog.close()
    assert in_another_thread() == []


def test_every_one_of_a_process_and_who_listened_before_hears_a_signal() -> None:
    """Two groups of ranks in one program, or a program with an event loop of its own."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write)
    dogs = [Watchdog(f"rank {number}", 600.0) for number in range(2)]
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        signal.raise_signal(signal.SIGINT)
        deadline = time.monotonic() + 10
        while None in [dog.signalled for dog in dogs] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [dog.signalled and dog.signalled[0] for dog in dogs] == [signal.SIGINT] * 2
        assert os.read(read, 1) == bytes([signal.SIGINT])
    finally:
        signal.signal(signal.SIGINT, handler)
        for dog in reversed(dogs):
            dog.close()
        signal.set_wakeup_fd(before)
        os.close(read)
        os.close(write)
