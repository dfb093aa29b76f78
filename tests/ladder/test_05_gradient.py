"""Rung 5, gradient: every LoRA gradient, by name, equals autograd's in PyTorch."""

from __future__ import annotations

import numpy as np
import torch

from tests.derived import assert_within_rounding
from tests.ladder.conftest import Case


def test_every_lora_gradient_equals_the_reference(case: Case) -> None:
    """All tensors, none skipped: the names are compared before the numbers."""
    ours = case.ours().gradients(case.batch)
    ref32 = case.reference(torch.float32).gradients(case.batch)
    ref64 = case.reference().gradients(case.batch)
    assert len(ours) == 2 * 7 * case.spec.num_hidden_layers
    assert_within_rounding("rung 5, gradient", ours, ref32, ref64, case.longest_sum)


def test_the_gradient_of_a_is_exactly_zero_where_b_is_zero(case: Case) -> None:
    """dA = scale * x^T (G B^T) vanishes with B, to the bit; dB = scale * (x A)^T G does not."""
    for name, gradient in case.with_zero_b().ours().gradients(case.batch).items():
        assert np.any(gradient) == name.endswith("lora_b"), name


def test_the_gradient_agrees_with_central_differences(case: Case) -> None:
    """An oracle without autograd: (f(w + h d) - f(w - h d)) / 2h in float64, d along the gradient."""
    gradients = case.ours().gradients(case.batch)
    length = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in gradients.values()))
    h = (3 * 2.0**-53) ** (1 / 3)
    means = []
    for sign in (1, -1):
        moved = {n: case.factors[n] + sign * h * gradients[n] / length for n in gradients}
        reference = case.reference()
        reference.model.load_state_dict(
            {**reference.model.state_dict(), **{n: torch.tensor(v) for n, v in moved.items()}}
        )
        nats, num_targets = reference.loss(case.batch)
        means.append(nats / num_targets)
    slope = (means[0] - means[1]) / (2 * h)
    # Our gradient is rounded to float32 over sums of length k; the difference itself errs by about h**2.
    assert abs(slope / length - 1) <= 8 * np.sqrt(case.longest_sum) * 2.0**-24
