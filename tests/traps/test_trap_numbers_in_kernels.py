"""A Python number in a compiled function becomes part of its kernels.

`mx.compile` makes one kernel of operations that follow each other, and writes numbers into its source. A
number that changes with the shape, such as the width of a row, so costs a new kernel for each width: on a GPU
seconds each. PyTorch's eager kernels take numbers as arguments. An array is an argument of the kernel too.

A CPU does the same, and leaves the source of every kernel in the folder for temporary files. Without a C++
compiler `mx.compile` compiles nothing there, and the test of the mistake is skipped.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

B = 2
WIDTHS = (37, 41, 43)

NumKernels = Callable[[], int]


@pytest.fixture
def num_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NumKernels:
    """How many kernels this test has compiled."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return lambda: len(list(tmp_path.glob("mlx/*/cpu/*.cpp")))


@pytest.mark.skipif(shutil.which("g++") is None, reason="mx.compile compiles nothing without a C++ compiler")
def test_wrong_a_width_as_a_number_costs_a_kernel_for_each_width(num_kernels: NumKernels) -> None:
    columns = mx.compile(lambda place_N, T: place_N % T + 1)
    for number, T in enumerate(WIDTHS, 1):
        assert np.array_equal(columns(mx.arange(B * T), T), [*range(1, T + 1)] * B)
        assert num_kernels() == number


def test_right_a_width_as_an_array_costs_one_for_all(num_kernels: NumKernels) -> None:
    columns = mx.compile(lambda place_N, T_1: place_N % T_1 + 1)
    for T in WIDTHS:
        assert np.array_equal(columns(mx.arange(B * T), mx.array([T])), [*range(1, T + 1)] * B)
    assert num_kernels() <= 1


def test_right_what_follows_from_the_shape_alone_comes_from_numpy(num_kernels: NumKernels) -> None:
    shifted = mx.compile(lambda column_N: column_N + 1)
    for T in WIDTHS:
        column_N = mx.array(np.arange(B * T) % T)
        assert np.array_equal(shifted(column_N), [*range(1, T + 1)] * B)
    assert num_kernels() <= 1
