"""The matrix of machines: every pair of settings meets, and what a run says is read."""

from __future__ import annotations

from itertools import combinations

from tests.matrix import ATEN, BLAS, DRAWS, MKL, Climbed, Setting, largest_shares, pairwise_cover

OUTPUT = """
   2 layer          53 passed                                            at most 12% of tolerance (logits)
   7 freezing       25 passed
   9 trajectory     13 passed                                            at most 9% of tolerance (losses)
"""


def test_every_two_settings_of_any_two_variables_meet() -> None:
    """In thirty runs, which is the fewest: ten draws times three dispatches."""
    runs = [(run.aten, run.mkl, run.blas, run.draw) for run in pairwise_cover()]
    for one, other in combinations(range(4), 2):
        values = (ATEN, MKL, BLAS, DRAWS)
        assert {(run[one], run[other]) for run in runs} == {
            (a, b) for a in values[one] for b in values[other]
        }
    assert len(runs) == len(DRAWS) * len(ATEN)


def test_an_unset_variable_is_unset_and_a_set_one_set() -> None:
    environment = Setting(None, "AVX2", "off", 3).environment()
    assert "ATEN_CPU_CAPABILITY" not in environment and environment["MKL_CBWR"] == "AVX2"


def test_of_each_rung_the_largest_share_is_named_with_its_run() -> None:
    runs = [
        Climbed(Setting(None, None, "off", 0), 0, OUTPUT),
        Climbed(Setting("avx2", None, "auto", 1), 0, OUTPUT.replace("9%", "11%")),
    ]
    assert list(largest_shares(runs)) == [
        "   2 layer          at most  12% of a tolerance (logits), "
        "--draw 0 --blas off ATEN_CPU_CAPABILITY=unset MKL_CBWR=unset",
        "   9 trajectory     at most  11% of a tolerance (losses), "
        "--draw 1 --blas auto ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=unset",
    ]
