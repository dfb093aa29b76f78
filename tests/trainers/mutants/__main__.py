"""`python -m tests.trainers.mutants` plants every mutant and prints the README's table; it takes minutes.

Arguments are names of mutants: it then plants only those.
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
    """The error of the worst tensor in the claim that catches the mutant, as a multiple of its tolerance."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        caught = first_failure(mutant)
    if caught is None:
        return "not caught"
    if caught.times_tolerance is None:
        return "no tolerance"
    if "not finite" in caught.report:
        return "not finite"
    return "to the bit" if math.isinf(caught.times_tolerance) else f"{caught.times_tolerance:.1e}"


os.environ["HYPOTHESIS_PROFILE"] = "nightly"  # the unpatched trainer then runs the cases of all mutants
chosen = {name: MUTANTS[name] for name in sys.argv[1:] or MUTANTS}
print("\n".join(table({name: times_its_tolerance(mutant) for name, mutant in chosen.items()})))
