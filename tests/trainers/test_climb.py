"""The climb of a mutant knows which claims call the code that it replaces: else a bug would pass unseen.

It knows from one climb of the sound trainer, in which every replaced name is spied on. So the spies must
change no result, that climb must come to its end, and each claim must do for itself all that it judges.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections import defaultdict
from collections.abc import Iterator
from types import CodeType
from typing import Any

import pytest

import mlx_impl
from tests.lora_ladder.here import FOLDER
from tests.trainers.mutants import MUTANTS
from tests.trainers.mutants import climb as climbing
from tests.trainers.mutants.climb import Climb, Failure, Touched, climb, first_failure, spied
from tests.trainers.mutants.mutant import PLAIN, SHIPPED

OPTIONS = "tests/lora_ladder/test_15_options.py::test_an_option_changes_the_results_and_gives_the_references"
MASKS = "tests/lora_ladder/test_10_equivalences.py::test_dropout_with_given_masks_equals_the_reference"


def watched(trainer: str, rung: int, claims: set[str]) -> tuple[Climb, Touched]:
    touched: Touched = defaultdict(set)
    with spied(trainer, touched):
        return climb(trainer, [rung], (), claims), touched


@pytest.mark.parametrize("trainer", [SHIPPED, PLAIN])
def test_a_spied_trainer_computes_as_before(trainer: str) -> None:
    """Also with given dropout masks, where the adapter asks which of the two paths it is on."""
    result, _ = watched(trainer, 10, {f"{MASKS}[untied]"})
    assert not result.failed, result.failed[0].report
    assert result.passed[10] == 1


def test_no_mutant_is_tried_where_the_sound_trainer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its climb ends at the failure, and what the claims above it call is not known."""
    failed = Climb((), failed=[Failure(10, "a claim", "its report", None)])
    monkeypatch.setattr(climbing, "sound", lambda trainer: (failed, defaultdict(set)))
    with pytest.raises(RuntimeError, match="the sound mlx_impl fails a claim"):
        first_failure(MUTANTS["mean-of-means"])


def test_each_of_two_claims_with_a_run_in_common_calls_what_it_calls() -> None:
    """Both sweeps begin at plain LoRA. With DoRA, the second's other value, no LoRA linear is called."""
    claims = {f"{OPTIONS}[LoRAConfig.{name}]" for name in ("rank", "use_dora")}
    _, touched = watched(SHIPPED, 15, claims)
    assert touched["mlx_impl.lora.LoRALinear.__call__"] == claims


def test_no_fixture_of_the_ladder_outlives_its_claim() -> None:
    """What the first claim computed, the second would judge without calling it."""
    files = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py")}
    assert "@pytest.fixture\n" in files["conftest.py"]
    assert not [name for name, text in files.items() if re.search(r"fixture\([^)]*scope", text)]


def test_what_the_trainer_keeps_for_the_process_calls_nothing_that_is_replaced() -> None:
    """A function with a cache runs in the first claim alone, and a mutant might find the sound result."""
    kept = {f"{function.__module__}.{function.__name__}": function for function in cached_functions()}
    assert "mlx_impl.fast.segments.layouts" in kept
    replaced = {target.rpartition(".")[2] for mutant in MUTANTS.values() for target in mutant.patches}
    for name, function in kept.items():
        assert not replaced & set(names_in(function.__wrapped__.__code__)), name


def cached_functions() -> Iterator[Any]:
    for found in pkgutil.walk_packages(mlx_impl.__path__, "mlx_impl."):
        if not found.name.endswith("__main__"):
            yield from (
                f for f in vars(importlib.import_module(found.name)).values() if hasattr(f, "cache_info")
            )


def names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)
