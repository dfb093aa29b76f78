"""`python -m tests.trainers.mutants` plants every mutant and prints the README's table, in some minutes.

Names as arguments: only those.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys

from tests.trainers.mutants import MUTANTS, table
from tests.trainers.mutants.climb import first_failure
from tests.trainers.mutants.mutant import Mutant


def times_its_tolerance(mutant: Mutant) -> str:
    """Of the claim that catches it: how far its worst tensor is out."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        caught = first_failure(mutant)
    if caught is None:
        return "not caught"
    if caught.times_tolerance is None:
        return "no tolerance"
    if "not finite" in caught.report:
        return "not finite"
    return "to the bit" if math.isinf(caught.times_tolerance) else f"{caught.times_tolerance:.1e}"


os.environ["HYPOTHESIS_PROFILE"] = "nightly"  # the sound trainer climbs what any mutant needs
chosen = {name: MUTANTS[name] for name in sys.argv[1:] or MUTANTS}
print("\n".join(table({name: times_its_tolerance(mutant) for name, mutant in chosen.items()})))
