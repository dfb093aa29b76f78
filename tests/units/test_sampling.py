"""Drawing the next token: the distribution is the one that NumPy works out from the definition."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_impl.run.sampling import Sampling

NUM_DRAWS = 20_000
LOGITS_V = np.array([0.3, 2.0, -1.0, 1.1, -3.0, 1.9, 0.0], dtype=np.float32)


def nucleus(logits_V: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Softmax, of which the smallest set that reaches p is kept and made to sum to one again."""
    p_V = np.exp(logits_V.astype(np.float64) / temperature)
    p_V /= p_V.sum()
    kept: list[int] = []
    for token in sorted(range(len(p_V)), key=lambda token: -p_V[token]):
        if p_V[kept].sum() < top_p:
            kept.append(token)
    return np.array([p_V[token] / p_V[kept].sum() if token in kept else 0.0 for token in range(len(p_V))])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.7, 0.5])
def test_tokens_are_drawn_as_the_definition_says(temperature: float, top_p: float) -> None:
    """Shares within five standard errors; what is outside the nucleus is never drawn."""
    mx.random.seed(3)
    logits_BV = mx.broadcast_to(mx.array(LOGITS_V), (NUM_DRAWS, len(LOGITS_V)))
    drawn_B = np.array(Sampling(temperature, top_p)(logits_BV))
    share_V = np.bincount(drawn_B, minlength=len(LOGITS_V)) / NUM_DRAWS
    expected_V = nucleus(LOGITS_V, temperature, top_p)
    assert (np.abs(share_V - expected_V) <= 5 * np.sqrt(expected_V * (1 - expected_V) / NUM_DRAWS)).all()


def test_the_token_that_reaches_p_is_the_last_one_kept() -> None:
    """Halves, quarters and eighths are exact: 1/2 + 1/4 reaches 0.75, and not 0.76."""
    logits_BV = mx.log(mx.broadcast_to(mx.array([0.125, 0.5, 0.125, 0.25]), (2000, 4)))
    for top_p, kept in ((0.25, {1}), (0.5, {1}), (0.74, {1, 3})):
        assert set(Sampling(1.0, top_p)(logits_BV).tolist()) == kept
    assert len(set(Sampling(1.0, 0.76)(logits_BV).tolist())) == 3


def test_rows_have_nuclei_of_their_own() -> None:
    logits_BV = mx.array([[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    for _ in range(50):
        assert Sampling(1.0, 0.5)(logits_BV).tolist() == [0, 2]


def test_the_tiniest_p_and_a_temperature_of_zero_take_the_most_likely() -> None:
    logits_BV = mx.array(LOGITS_V)[None]
    for sampling in (Sampling(), Sampling(0.0, 0.5), Sampling(5.0, 1e-9)):
        assert {sampling(logits_BV).item() for _ in range(50)} == {1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-1.0, 1.0), "temperature must be finite and at least 0, got -1.0"),
        ((float("nan"), 1.0), "temperature must be finite and at least 0, got nan"),
        ((float("inf"), 1.0), "temperature must be finite and at least 0, got inf"),
        ((1.0, 0.0), r"top_p must be in \(0, 1\], got 0.0"),
        ((1.0, 1.5), r"top_p must be in \(0, 1\], got 1.5"),
        ((1.0, float("nan")), r"top_p must be in \(0, 1\], got nan"),
    ],
)
def test_what_is_no_distribution_is_refused(values: tuple[float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(*values)
