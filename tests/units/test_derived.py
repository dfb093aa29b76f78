"""The noise of `tests/derived.py`: the same on every machine, and enough for any right float32 program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.derived import FACTOR, NUM_DRAWS, noise_of
from tests.lora_ladder.cases import Draw, cached_for_each_draw, named_case
from tests.lora_ladder.protocol import Arrays, Dialect
from tests.lora_ladder.test_09_trajectory import RUNS, trained
from tests.nightly import mostly_at_night
from tests.trainers.reference import oracle

ROOT = Path(__file__).resolve().parents[2]
MACHINES = [
    {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"},
    {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2"},
]


def results(case_name: str, seed: int | None = None, dtype: torch.dtype = torch.float64) -> Arrays:
    """Losses and factors of twenty updates of AdamW; with a seed, of the inputs moved."""
    case = named_case(case_name)
    moved = case if seed is None else case.moved(seed)
    return trained(moved.build(oracle(Dialect(), dtype)), case, RUNS["adamw"])


@cached_for_each_draw
def noise(case_name: str) -> dict[str, float]:
    return noise_of((results(case_name, seed) for seed in range(NUM_DRAWS)), results(case_name))


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: "-".join(machine.values()))
@pytest.mark.nightly
def test_the_noise_does_not_depend_on_the_dispatch_of_pytorch_or_mkl(machine: dict[str, str]) -> None:
    code = (
        "import json, torch; torch.set_num_threads(1); from tests.units.test_derived import noise; "
        "print(json.dumps(noise('untied')))"
    )
    command, environment = [sys.executable, "-c", code], {**os.environ, **machine}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    there, here = json.loads(done.stdout), noise("untied")
    assert all(there[name] == pytest.approx(here[name], rel=1e-6) for name in here)


@pytest.mark.parametrize("draw", mostly_at_night(range(2), 1))
def test_pytorchs_own_float32_is_within_the_tolerance_and_not_far_below(draw: int) -> None:
    """Each tensor is within 8 times the noise, and the noise is on average at most ten times their error."""
    with Draw.set_to(draw):
        exact, in_float32, expected = results("dora"), results("dora", dtype=torch.float32), noise("dora")
    errors = np.array([np.linalg.norm(in_float32[name] - exact[name]) / expected[name] for name in exact])
    print(f"{errors.mean():.2f} of the noise on average, {errors.max():.2f} at most")
    assert errors.max() < FACTOR and errors.mean() > 1 / 10
