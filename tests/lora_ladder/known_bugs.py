"""All signatures, in the order in which a culprit is named: simple before composed."""

from __future__ import annotations

from tests.lora_ladder import (
    signatures_accumulation,
    signatures_attention,
    signatures_base,
    signatures_dora,
    signatures_dropout,
    signatures_forward,
    signatures_gradient,
    signatures_loss,
    signatures_model,
    signatures_optimizer,
    signatures_schedule,
    signatures_update,
)
from tests.lora_ladder.signatures import Signature

SIGNATURES: list[Signature] = [
    *signatures_forward.SIGNATURES,
    *signatures_dora.SIGNATURES,
    *signatures_attention.SIGNATURES,
    *signatures_model.SIGNATURES,
    *signatures_loss.SIGNATURES,
    *signatures_gradient.SIGNATURES,
    *signatures_base.SIGNATURES,
    *signatures_optimizer.SIGNATURES,
    *signatures_schedule.SIGNATURES,
    *signatures_update.SIGNATURES,
    *signatures_accumulation.SIGNATURES,
    *signatures_dropout.SIGNATURES,
    *signatures_dropout.OF_LAWS.values(),
]
