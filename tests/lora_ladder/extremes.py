"""What the claims about sizes and extreme numbers share: cases, and the rule for NaN and infinity.

The rule: where a NaN or an infinity goes in, a trainer refuses, or NaN or infinity comes out. It never turns
into a zero or into any other finite number, because then a ruined run looks sound. A refusal is a ValueError,
an ArithmeticError or a RuntimeError; any other exception is an accident and fails the claim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from mlx_impl.data import Batch
from tests.derived import Divergence
from tests.lora_ladder.cases import (
    LORA,
    SPEC,
    Case,
    cached_for_each_draw,
    copies,
    make_batch,
    make_factors,
    make_weights,
    random_rows,
    rows_of,
)
from tests.lora_ladder.judge import Judge, arrays
from tests.lora_ladder.protocol import Arrays

T = TypeVar("T")
REFUSALS = (ValueError, ArithmeticError, RuntimeError)
ENDS = {"nan": np.nan, "infinity": np.inf}

ONE_LAYER = replace(SPEC, num_hidden_layers=1)
SMALL = replace(
    ONE_LAYER,
    hidden_size=12,
    intermediate_size=20,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
)
# On CUDA `mx.fast.rope` fails with "invalid argument" (MLX 0.32.4) for 300 rows of heads of 4, not of 64.
WIDE_HEADS = replace(SMALL, head_dim=64)
LONG_COUNTS = (1200, 40)  # tokens of each row; tables, blocks and windows often hold 512 or 1024
SHORTER_COUNTS = (600, 40)  # for what costs more
LONG_PROMPTS = (20, 39)
COPIES = 18  # of a batch of 58 targets: with 33,013 words, more than 2**25 logits
SHARP_HEADS = (0, 1, 3)


@dataclass(frozen=True)
class CaseOfRows(Case):
    """A case with rows of its own lengths."""

    token_counts: tuple[int, ...] = ()
    prompt_counts: tuple[int, ...] = ()

    @property
    def batch(self) -> Batch:
        return make_batch(random_rows(self.spec.vocab_size, self.token_counts), self.prompt_counts)


def case_of(
    spec: Any, name: str, token_counts: tuple[int, ...], prompt_counts: tuple[int, ...]
) -> CaseOfRows:
    weights = make_weights(spec)
    factors = make_factors(spec, LORA, weights)
    return CaseOfRows(name, spec, LORA, weights, factors, False, token_counts, prompt_counts)


@cached_for_each_draw
def long_rows() -> CaseOfRows:
    return case_of(SMALL, "long rows", LONG_COUNTS, LONG_PROMPTS)


@cached_for_each_draw
def shorter_rows() -> CaseOfRows:
    return case_of(SMALL, "rows of 600", SHORTER_COUNTS, LONG_PROMPTS)


@cached_for_each_draw
def windowed_rows() -> CaseOfRows:
    """Rows that are long enough for attention in blocks of a window."""
    return case_of(replace(SMALL, sliding_window=150), "rows of 600, window", SHORTER_COUNTS, LONG_PROMPTS)


@cached_for_each_draw
def many_rows() -> CaseOfRows:
    """300 rows of four tokens: a row's number does not fit in a byte."""
    return case_of(WIDE_HEADS, "many rows", (4,) * 300, (2,) * 300)


@cached_for_each_draw
def many_words() -> CaseOfRows:
    """Two rows with together 58 targets over 33,013 words."""
    return case_of(replace(SMALL, vocab_size=33_013), "many words", (31, 34), (3, 4))


@cached_for_each_draw
def sharp() -> Case:
    """Scores and logits of about 1e4: three heads' queries and the head are multiplied by 4096.

    There is one layer, because a second would turn the first one's rounding, times 1e4, into anything. The
    other heads are tame, and give the gradients of queries and keys a size that float32 holds.
    """
    weights = copies(make_weights(ONE_LAYER))
    for head in SHARP_HEADS:
        weights["model.layers.0.self_attn.q_proj.weight"][head * 10 : head * 10 + 10] *= 4096
    weights["lm_head.weight"] *= 4096
    return Case("sharp", ONE_LAYER, LORA, weights, make_factors(ONE_LAYER, LORA, make_weights(ONE_LAYER)))


@cached_for_each_draw
def looking_back() -> Case:
    """Head h attends to the token h + 1 places back, so an answer shows each key that is lost or moved.

    Every embedding has 2 as its first number, from which q gets, for the pair of frequency f, the angle -d f,
    and k the angle 0. After RoPE their product is highest d places back.
    """
    weights = copies(make_weights(ONE_LAYER))
    heads, pairs = ONE_LAYER.num_attention_heads, ONE_LAYER.head_dim // 2
    angle_HP = np.outer(np.arange(1, heads + 1), ONE_LAYER.rope_theta ** -(np.arange(pairs) / pairs))
    q_H2P = np.stack([np.cos(angle_HP), -np.sin(angle_HP)], axis=1)
    weights["model.embed_tokens.weight"][:, 0] = 2
    weights["model.layers.0.self_attn.q_proj.weight"][:, 0] = 1.5 * q_H2P.flatten()
    k_O = weights["model.layers.0.self_attn.k_proj.weight"][:, 0]
    k_O[:] = 1.5 * (np.arange(len(k_O)) % ONE_LAYER.head_dim < pairs)
    return Case("looking back", ONE_LAYER, LORA, weights, make_factors(ONE_LAYER, LORA, weights))


def repeated(batch: Batch, times: int) -> Batch:
    """Each row so many times, one row's copies after the other's."""
    return rows_of(batch, [row for row in range(len(batch.inputs_BT)) for _ in range(times)])


def without_targets(batch: Batch) -> Batch:
    return batch._replace(mask_BT=np.zeros_like(batch.mask_BT))


def with_number(case: Case, name: str, number: float, index: tuple[int, ...] | None = None) -> Case:
    """One element of this weight or factor replaced."""
    weights, factors = copies(case.weights), copies(case.factors)
    array = (weights if name in weights else factors)[name]
    array[index or (0,) * array.ndim] = number
    return replace(case, weights=weights, factors=factors)


def with_ruined_token(case: Case, number: float) -> tuple[Case, Batch]:
    """A token with NaN or infinity in its embedding, and a batch whose first row begins with that token."""
    batch = case.batch
    seen = {*batch.inputs_BT.flatten().tolist(), *batch.targets_BT.flatten().tolist()}
    token = max(set(range(1, case.spec.vocab_size)) - seen)
    inputs_BT = batch.inputs_BT.copy()
    inputs_BT[0, 0] = token
    return with_number(case, "model.embed_tokens.weight", number, (token, 0)), batch._replace(
        inputs_BT=inputs_BT
    )


def unless_refused(act: Callable[[], T]) -> T | None:
    """None if the act is refused."""
    try:
        return act()
    except NotImplementedError:
        raise
    except REFUSALS:
        return None


def is_refused(act: Callable[[], object]) -> bool:
    return unless_refused(lambda: (act(),)) is None


def lost_in_the_reference(judge: Judge, case: Case, act: Callable[[Any], Mapping[str, Any]]) -> Arrays:
    """Which of the act's numbers are not finite in the reference, in float64."""
    found = arrays(act(case.build(judge.oracle(torch.float64))))
    return {name: ~np.isfinite(array) for name, array in found.items()}


def require_lost(judge: Judge, case: Case, act: Callable[[Any], Mapping[str, Any]], what: str) -> None:
    """The trainer refuses, or no number is finite that is not finite in the reference."""
    __tracebackhide__ = True
    is_lost = lost_in_the_reference(judge, case, act)
    assert any(lost.any() for lost in is_lost.values()), "the claim would be about nothing"
    ours = unless_refused(lambda: judge.run(case, act))
    if ours is not None:
        judge.require_names(ours, is_lost)
        judge.report(lambda: require_none_finite(f"{judge.title}: {what}", ours, is_lost))


def require_none_finite(what: str, ours: Arrays, is_lost: Arrays) -> None:
    __tracebackhide__ = True
    for name, lost in is_lost.items():
        hidden = lost & np.isfinite(ours[name])
        if hidden.any():
            first = tuple(int(i) for i in np.argwhere(hidden)[0])
            raise Divergence(
                f"{what} must be refused, or come out as NaN or infinity\n{name}: {hidden.sum()} of "
                f"{lost.sum()} numbers are finite that are not in the reference; the first is "
                f"{list(first)}: {ours[name][first]:.9g}"
            )
