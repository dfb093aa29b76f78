"""Many processes train as one does: `mx.distributed`'s ring on the loopback address."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests import ring
from tests.nightly import mostly_at_night
from tests.ring import outputs
from tests.units.sum_program import sums_of

PROGRAM = "tests.units.rank_program"


def start(tmp_path: Path, num_ranks: int, *arguments: str) -> list[subprocess.Popen]:
    return ring.start(tmp_path, num_ranks, PROGRAM, *arguments)


@cache
def run_alone() -> str:
    command = [sys.executable, "-m", PROGRAM, "--alone"]
    done = subprocess.run(command, cwd=ring.ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.parametrize(("num_ranks", "SLICE"), mostly_at_night([(2, 100), (4, 2**20)], 1))
def test_ranks_train_as_one_rank_does_to_the_bit(tmp_path: Path, num_ranks: int, SLICE: int) -> None:
    """With DoRA, LoRA+, dropout, clipping, uneven targets, a short window and idle ranks."""
    expected = run_alone()
    assert outputs(start(tmp_path, num_ranks, "--slice", str(SLICE))) == [(0, expected, "")] * num_ranks


@pytest.mark.parametrize(("num_ranks", "num_parts"), mostly_at_night([(2, 5), (3, 2)], 1))
def test_sums_in_any_order_are_within_their_bound(tmp_path: Path, num_ranks: int, num_parts: int) -> None:
    """(M - 1) u sum |g_m| for M numbers of unit roundoff u; with more ranks than micro-batches too."""
    done = outputs(ring.start(tmp_path, num_ranks, "tests.units.sum_program", str(num_parts)))
    assert len(set(done)) == 1 and not done[0][0], done
    nats, count, *gradients = json.loads(done[0][1])
    parts = [sums_of(number) for number in range(1, num_parts + 1)]
    assert (nats, count) == (sum(part[0][0].item() for part in parts), sum(range(1, num_parts + 1)))
    for ours, name in zip(gradients, "ab", strict=True):
        terms = np.array([np.array(tree_flatten(part[1][name])[0][1], np.float64) for part in parts])
        bound = (num_parts - 1) * 2.0**-24 * np.abs(terms).sum(axis=0)
        assert (np.abs(np.array(ours) - terms.sum(axis=0)) <= bound).all()


def test_a_run_of_two_ranks_resumes_with_three_to_the_bit(tmp_path: Path) -> None:
    expected = run_alone()
    saved = str(tmp_path / "state.safetensors")
    first = outputs(start(tmp_path, 2, "--stop-after", "2", "--state", saved))
    assert [code for code, _, _ in first] == [0, 0], first
    rest = outputs(start(tmp_path, 3, "--state", saved))
    assert rest == [(0, expected, "")] * 3


@pytest.mark.parametrize("what", mostly_at_night(["factors", "data", "model", "seed", "order"], 1))
def test_ranks_that_differ_are_refused_by_name(tmp_path: Path, what: str) -> None:
    named = {
        "data": "the training data",
        "factors": "the adapter or the optimizer's state",
        "model": "the model's weights",
        "order": "the order of sums",
    }.get(what, what)
    for code, _, error in outputs(start(tmp_path, 2, "--differ", what)):
        assert code == 2
        assert error == f"all ranks must train alike, and on rank 1 {named} is not rank 0's\n"


def test_where_a_rank_dies_the_others_end_within_ten_seconds(tmp_path: Path) -> None:
    """By SIGKILL, in the middle of a run."""
    ranks = start(tmp_path, 3, "--slowly")
    assert ranks[1].stdout is not None
    ranks[1].stdout.readline()
    ranks[1].kill()
    killed = time.monotonic()
    found = outputs(ranks)
    assert time.monotonic() - killed < 10
    for code, _, error in (found[0], found[2]):
        assert code == 1
        assert "another rank has ended" in error


@pytest.mark.parametrize("moment", mostly_at_night(["loop", "update"], 1))
def test_ctrl_c_in_one_training_ends_it_on_all_ranks_and_the_next_is_sound(
    tmp_path: Path, moment: str
) -> None:
    """A program that catches KeyboardInterrupt: both get it after update 2, and train again to the bit."""
    digest = run_alone().split()[-1]
    done = outputs(ring.start(tmp_path, 2, "tests.units.twice_program", moment))
    assert done[0][0] == done[1][0] == 0, done
    for _, output, _ in done:
        first, second = output.splitlines()
        assert first.startswith("Ctrl-C 2 ") and second == f"5 {digest}"


@pytest.mark.nightly
@pytest.mark.parametrize("is_stopped", [False, True], ids=["asleep", "SIGSTOP"])
def test_a_rank_that_hangs_ends_the_others_at_the_time_out(tmp_path: Path, is_stopped: bool) -> None:
    """Rank 1 sleeps for a minute, or is stopped within its run; the others wait for 3 seconds."""
    ranks = start(tmp_path, 2, "--slowly" if is_stopped else "--hang", "--timeout", "3")
    if is_stopped:
        assert ranks[1].stdout is not None
        ranks[1].stdout.readline()
        ranks[1].send_signal(signal.SIGSTOP)
    ((code, _, error), _) = outputs(ranks[:1] + ranks[:1])
    ranks[1].kill()
    ranks[1].communicate()
    assert (code, error) == (1, "error: rank 0: no answer from another rank within 3 s\n")


@pytest.mark.nightly
def test_a_rank_that_waits_in_vain_obeys_sigterm(tmp_path: Path) -> None:
    """The launcher sends SIGTERM and never SIGKILL: nobody is orphaned."""
    ranks = start(tmp_path, 2, "--hang")
    assert ranks[0].stdout is not None
    ranks[0].stdout.readline()
    ranks[0].send_signal(signal.SIGTERM)
    assert ranks[0].wait(timeout=30) == 128 + signal.SIGTERM
    for rank in ranks:
        rank.kill()
        rank.communicate()


def start_alone(tmp_path: Path, number: int, join_timeout: float) -> list[subprocess.Popen]:
    """Two ranks, of which this one waits for the other to start, which never does."""
    ranks = start(tmp_path, 2, "--join-timeout", str(join_timeout))
    ranks[1 - number].kill()
    waiting = ranks[number].stdout
    assert waiting is not None and waiting.readline() == "joining\n"
    return ranks


@pytest.mark.parametrize("number", mostly_at_night([1, 0], 1))
def test_a_rank_that_waits_for_others_to_start_obeys_sigterm_at_once(tmp_path: Path, number: int) -> None:
    """Where a rank cannot start, a launcher ends the others this way. MLX holds Python's lock meanwhile."""
    ranks = start_alone(tmp_path, number, 60.0)
    time.sleep(0.5)
    ranks[number].send_signal(signal.SIGTERM)
    sent = time.monotonic()
    assert outputs(ranks)[number][0] in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert time.monotonic() - sent < 5


def test_where_a_rank_never_starts_the_others_end_at_the_time_out(tmp_path: Path) -> None:
    ranks = start_alone(tmp_path, 0, 1.0)
    code, _, error = outputs(ranks)[0]
    assert code == 1
    assert error.startswith("the ranks have not come together within 1 s (") and error.count("\n") == 1
