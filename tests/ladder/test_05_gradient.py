"""Rung 5, gradient: every LoRA gradient, by name, equals autograd's in PyTorch."""

from __future__ import annotations

import numpy as np
import torch

from tests.derived import FACTOR, UNIT_ROUNDOFF, assert_within_rounding
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


def test_every_gradient_agrees_with_central_differences(case: Case) -> None:
    """An oracle without autograd: (f(w + h d) - f(w - h d)) / 2h = <gradient, d> in float64.

    For each tensor a random direction d of its own, so that no component can hide. Ours was rounded to
    float32 over sums of length k: the floor of `derived`. The difference errs by about h^2, far less.
    """
    rng = np.random.default_rng(17)
    reference, h = case.reference(), (3 * 2.0**-53) ** (1 / 3)
    parameters = dict(reference.model.named_parameters())
    for name, gradient in case.ours().gradients(case.batch).items():
        d = rng.standard_normal(gradient.shape)
        d /= np.linalg.norm(d)
        means = []
        for sign in (1, -1):
            with torch.no_grad():
                parameters[name].copy_(torch.tensor(case.factors[name] + sign * h * d))
            nats, num_targets = reference.loss(case.batch)
            means.append(nats / num_targets)
        with torch.no_grad():
            parameters[name].copy_(torch.tensor(case.factors[name]))
        slope = (means[0] - means[1]) / (2 * h)
        tolerance = FACTOR * np.sqrt(case.longest_sum) * UNIT_ROUNDOFF * np.linalg.norm(gradient)
        assert abs(slope - np.sum(gradient * d)) <= tolerance, name
