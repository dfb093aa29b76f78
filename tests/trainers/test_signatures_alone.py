"""A signature of the rungs 2 and 4 that no planted bug has, given its own: it alone explains the numbers.

The bug is the signature's own wrong reference, computed in float32. So this shows that rounding does not hide
the bug, that some observation sees it, and that no other signature means the same. Whether it is a right
account of the bug, only a bug planted elsewhere can show: test_signatures.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.lora_ladder import culprit
from tests.lora_ladder.known_bugs import SIGNATURES
from tests.lora_ladder.observations import Observation
from tests.lora_ladder.protocol import Arrays, Dialect
from tests.lora_ladder.signatures import Signature
from tests.nightly import mostly_at_night
from tests.trainers.reference import Float32Reference, oracle
from tests.trainers.signature_bugs import OF_MUTANTS, OF_OTHERS

PLANTED = {*OF_MUTANTS.values(), *OF_OTHERS}
RUNGS = (2, 4)
SMALLER = {"norm eps 1e-08", "norm eps 1e-12", "norm eps 0"}  # than what float32 tells apart
ALONE = [one for one in SIGNATURES if one.rung in RUNGS and one.name not in PLANTED | SMALLER]


@pytest.mark.parametrize("signature", mostly_at_night(ALONE, 0), ids=[one.name for one in ALONE])
def test_a_signature_is_named_for_its_own_bug_and_no_other(
    signature: Signature, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(_: Any, observation: Observation) -> Arrays | None:
        assert signature.hypothesis is not None
        try:
            return signature.hypothesis(oracle(Dialect(), torch.float32), observation.case, observation.act)
        except Exception:  # the bug cannot be in this case
            return None

    monkeypatch.setattr(culprit, "answer_of", answer)
    found = culprit.find(Float32Reference, signature.rung)
    assert [one.name for one in found.named] == [signature.name], (found.family, found.fails)
