"""The benchmarks of short examples and of long rows: what they compare is comparable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import long_rows, short_examples
from benchmarks.cases import CASES
from benchmarks.inputs import EXAMPLES, read_inputs
from mlx_impl.data import Window

SIDES = {name: case for name, (trainer, case) in short_examples.sides_of(CASES["tiny"]).items()}


def targets_of(windows: list[Window]) -> list[int]:
    """Sorted."""
    targets = [batch.targets_BT[batch.mask_BT] for window in windows for batch in window]
    return sorted(np.concatenate(targets).tolist())


@pytest.mark.parametrize("name", SIDES)
def test_every_side_trains_on_the_same_examples_once(name: str) -> None:
    windows = read_inputs(SIDES[name]).windows
    numbers = [number for window in windows for batch in window for number in batch.numbers]
    assert sorted(numbers) == list(range(EXAMPLES))
    assert targets_of(windows) == targets_of(read_inputs(SIDES["plain"]).windows)


@pytest.mark.parametrize("name", SIDES)
def test_an_update_has_as_many_tokens_on_every_side(name: str) -> None:
    """On average, within a tenth."""
    epoch, plain = short_examples.epoch_of(SIDES[name]), short_examples.epoch_of(SIDES["plain"])
    assert epoch.tokens == plain.tokens
    assert epoch.tokens / epoch.updates == pytest.approx(plain.tokens / plain.updates, rel=0.1)
    assert epoch.positions >= epoch.tokens and 0 < epoch.shapes <= epoch.updates


def test_a_process_begins_with_the_kernels_that_mlx_has_and_keeps_new_ones_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a.ptx").write_text("compiled")
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "kept"))
    one, other = (short_examples.own_kernels(tmp_path / name) for name in ("one", "other"))
    assert one != other
    assert all(Path(e["MLX_PTX_CACHE_DIR"], "a.ptx").read_text() == "compiled" for e in (one, other))


def test_sides_that_do_not_wait_start_together() -> None:
    case = replace(CASES["tiny"], needs_gpu=True)
    sides = dict.fromkeys(("one", "other"), ("ours", case))
    epochs = dict.fromkeys(sides, short_examples.Epoch(updates=1, shapes=1, tokens=1, positions=1))
    measured = short_examples.measure(sides, epochs, 1)
    assert all(m.first > 0 and m.peak_bytes > 0 and len(m.seconds) == 1 for m in measured.values())


def test_the_examples_are_of_these_lengths() -> None:
    (low, high), case = short_examples.LENGTHS, replace(SIDES["plain"], batch_size=1)
    lengths = [batch.num_tokens for window in read_inputs(case).windows for batch in window]
    assert low <= min(lengths) < 1.1 * low and 0.9 * high < max(lengths) <= high


@pytest.mark.parametrize("kind", long_rows.KINDS)
def test_a_long_row_has_so_many_tokens_of_every_kind(kind: str) -> None:
    records = long_rows.updates(CASES["tiny"], kind, 64)
    record = next(records)
    records.close()
    assert record.num_tokens == record.num_targets == 64
