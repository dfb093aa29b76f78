"""The number of examples: HYPOTHESIS_PROFILE is `tox` (few, the same each time) or `nightly` (many).

A failure prints the line that reproduces its example.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

# Each example builds a model and runs it many times, so even a few examples take seconds.
COMMON = settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("tox", COMMON, max_examples=8, derandomize=True, database=None)
settings.register_profile("nightly", COMMON, max_examples=1000, phases=set(Phase) - {Phase.explain})
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "tox"))


def pytest_report_header() -> str:
    chosen = settings()
    return f"hypothesis: {chosen.max_examples} examples a property{', always the same' * chosen.derandomize}"
