"""Rung 5, gradient: every factor's gradient, by name, by three oracles that know nothing of one another.

PyTorch's autograd; central differences, which need no autograd, with a test of their order; and the adjoint
identity <J v, u> = <v, J^T u>, which needs no second trainer. MLX: `mx.value_and_grad` of a model returns a
gradient for every parameter, frozen ones too; `nn.value_and_grad` is the one that respects `freeze()`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.derived import UNIT_ROUNDOFF, Verdict, judged, within
from tests.ladder.cases import Case, cached_for_each_draw, every_case, named_case, one_prompt_batch
from tests.ladder.judge import Judge

WIDE, NARROW = 2.0**-8, 2.0**-9  # steps of central differences: the error shrinks with their square


@every_case
def test_every_gradient_equals_the_reference(case: Case, judge: Judge) -> None:
    """All tensors, none skipped: the names are compared before the numbers."""
    judge(case, lambda trainer: trainer.gradients(case.batch))


@pytest.mark.needs("exact")
@every_case
def test_in_float64_every_gradient_equals_the_reference_to_1e_12(case: Case, judge: Judge) -> None:
    """The algebra is the same; what differed above was rounding."""
    judge.exactly(case, lambda trainer: trainer.gradients(case.batch))


@every_case
def test_the_gradients_of_rows_under_one_prompt_equal_the_reference(case: Case, judge: Judge) -> None:
    """What all rows begin with may be computed once; its gradient is the sum over the rows."""
    batch = one_prompt_batch(case.spec.vocab_size)
    judge(case, lambda trainer: trainer.gradients(batch))


@pytest.mark.parametrize("case", ["untied", "rslora", "patterns"], indirect=True)
def test_the_gradient_of_a_is_exactly_zero_where_b_is_zero(case: Case, candidate: Any) -> None:
    """dA = scale * x^T (G B^T) vanishes with B, to the bit; dB = scale * (x A)^T G does not."""
    for name, gradient in case.with_zero_b().build(candidate).gradients(case.batch).items():
        assert np.any(gradient) == name.endswith("lora_b"), name


def unit_direction(name: str, case: Case) -> np.ndarray:
    """One of its own for each tensor, so that no component can hide."""
    shape = case.factors[name].shape
    d = np.random.default_rng(len(name)).standard_normal(shape)
    return d / np.linalg.norm(d)


@cached_for_each_draw
def slopes(case_name: str, names: tuple[str, ...], trainer: Any, h: float) -> dict[str, float]:
    """(f(w + h d) - f(w - h d)) / 2h of the mean loss, for each factor alone."""
    case, found = named_case(case_name), {}
    for name in names:
        means = []
        for sign in (1, -1):
            moved = {**case.factors, name: case.factors[name] + sign * h * unit_direction(name, case)}
            nats, num_targets = replace(case, factors=moved).build(trainer).loss(case.batch)
            means.append(nats / num_targets)
        found[name] = (means[0] - means[1]) / (2 * h)
    return found


@pytest.mark.parametrize("case", ["untied", "dora"], indirect=True)
def test_every_gradient_agrees_with_central_differences(case: Case, judge: Judge, candidate: Any) -> None:
    """Their error falls fourfold when h is halved, so it is h^2's, and what is left at h = 0 is the gradient.

    DoRA's gradient is that of its formula with the length held constant; only in the magnitudes, on which the
    length does not depend, is it the slope.
    """
    oracle, gradients = judge.oracle(torch.float64), case.build(candidate).gradients(case.batch)
    exact, noise = judge.reference(case, lambda trainer: trainer.gradients(case.batch))
    names = tuple(n for n in exact if n.endswith("magnitude") or not case.lora.use_dora)
    wide, narrow = (slopes(case.name, names, oracle, h) for h in (WIDE, NARROW))
    verdicts = []
    for name in names:
        direction = unit_direction(name, case)
        truth = float(np.sum(exact[name] * direction))
        ratio = (wide[name] - truth) / (narrow[name] - truth)
        assert round(ratio) == 4, f"{name}: halving h divides the error by {ratio:.3f}, expected 4"
        at_zero = (4 * narrow[name] - wide[name]) / 3  # Richardson: the term in h^2 is gone
        ours = np.array(np.sum(gradients[name] * direction))
        rounding = abs(at_zero - truth) + noise[name]  # along a unit direction at most that of the tensor
        source = "the noise and what Richardson leaves"
        verdicts.append(within(name, ours, np.array(at_zero), rounding, case.longest_sum, source))
    judge.hold(verdicts)


def cotangent(case: Case) -> np.ndarray:
    shape = (*case.batch.inputs_BT.shape, case.spec.vocab_size)
    return np.random.default_rng(23).standard_normal(shape).astype(np.float32)


@pytest.mark.needs("pullback")
@pytest.mark.alone
@every_case
def test_the_pullback_of_a_given_cotangent_equals_the_reference(case: Case, judge: Judge) -> None:
    """The backward pass alone: the loss is not asked, the logits' gradient is given."""
    judge(case, lambda trainer: trainer.pullback(case.batch, cotangent(case)))


def adjoint_verdict(case: Case, candidate: Any, unit: float, noise: float) -> Verdict:
    """<J v, u> from six forward passes, held to <v, J^T u> from one backward pass, by the trainer alone.

    J v is the Richardson limit of central differences of the logits with steps h and h / 2; the limit with
    2 h and h bounds its truncation. `noise` is what rounding does to the logits, in the Frobenius norm: to
    the limit it does at most (8 + 1) / 3h as much, times |u|.
    """
    h = unit ** (1 / 5)  # where truncation, h^4, and rounding, unit / h, meet
    u_BTV = cotangent(case).astype(np.float64)
    directions = {name: unit_direction(name, case) / np.sqrt(len(case.factors)) for name in case.factors}

    def pushed(step: float) -> float:
        sides = []
        for way in (step, -step):
            moved = {n: w + (way * directions[n]).astype(w.dtype) for n, w in case.factors.items()}
            sides.append(replace(case, factors=moved).build(candidate).logits(case.batch.inputs_BT))
        return float(np.sum((sides[0].astype(np.float64) - sides[1]) / (2 * step) * u_BTV))

    wide, middle, narrow = pushed(2 * h), pushed(h), pushed(h / 2)
    limit = (4 * narrow - middle) / 3
    truncation = abs(limit - (4 * middle - wide) / 3)
    rounding = noise * float(np.linalg.norm(u_BTV)) * 3 / h
    pulled = case.build(candidate).pullback(case.batch, cotangent(case))
    back = sum(float(np.sum(pulled[n].astype(np.float64) * d)) for n, d in directions.items())
    derivation = f"rounding of the logits {rounding:.3g} + truncation {truncation:.3g}"
    return judged("<J v, u>", np.array(limit), np.array(back), rounding + truncation, derivation)


@pytest.mark.needs("pullback")
@pytest.mark.alone
@pytest.mark.parametrize("case", ["untied", "qk norm", "rslora"], indirect=True)
def test_forward_and_backward_are_adjoint(case: Case, judge: Judge, candidate: Any) -> None:
    """<J v, u> = <v, J^T u>, without a second trainer."""
    _, noise = judge.reference(case, lambda trainer: {"logits": trainer.logits(case.batch.inputs_BT)})
    judge.hold([adjoint_verdict(case, candidate, UNIT_ROUNDOFF, noise["logits"])])


@pytest.mark.needs("pullback", "exact")
@pytest.mark.alone
@pytest.mark.parametrize("case", ["untied", "qk norm", "rslora"], indirect=True)
def test_in_float64_forward_and_backward_are_adjoint(case: Case, judge: Judge, candidate: Any) -> None:
    """The same where rounding hides almost nothing."""
    double = case.in_double()
    logits_BTV = case.build(judge.oracle(torch.float64)).logits(case.batch.inputs_BT)
    noise = np.sqrt(case.longest_sum) * 2.0**-53 * float(np.linalg.norm(logits_BTV))
    with candidate.exact():
        judge.hold([adjoint_verdict(double, candidate, 2.0**-53, noise)])
