"""`python -m tests.trainers.twins` plants every twin and prints the README's table, in some minutes.

Names as arguments: only those.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys

from tests.trainers.twins import TWINS, table
from tests.trainers.twins.climb import first_failure
from tests.trainers.twins.twin import Twin


def times_its_tolerance(twin: Twin) -> str:
    """Of the claim that catches it: how far its worst tensor is out."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        caught = first_failure(twin)
    if caught is None:
        return "not caught"
    if caught.times_tolerance is None:
        return "no tolerance"
    if "not finite" in caught.report:
        return "not finite"
    return "to the bit" if math.isinf(caught.times_tolerance) else f"{caught.times_tolerance:.1e}"


os.environ["HYPOTHESIS_PROFILE"] = "nightly"  # the sound trainer climbs what any twin needs
chosen = {name: TWINS[name] for name in sys.argv[1:] or TWINS}
print("\n".join(table({name: times_its_tolerance(twin) for name, twin in chosen.items()})))
