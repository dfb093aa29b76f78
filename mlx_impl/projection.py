"""Linears of one input together, with the gradient of their low-rank updates written out.

For x of N rows, frozen W_j, trained A_j and B_j, and scales s_j (Hu et al. 2021, "LoRA", eq. 3):

    h_j = x (s_j A_j)      y_j = x W_j^T + h_j B_j          (all A_j side by side: one matmul)
    dh_j = dy_j B_j^T      dx = sum_j dy_j W_j + dh_j (s_j A_j)^T
    dA_j = s_j x^T dh_j    dB_j = h_j^T dy_j

Automatic differentiation of `LoRALinear.__call__`, which the tests compare with, gives the same numbers with
more passes over memory. Here each sum is formed by the matmul that makes its last term (`mx.addmm`), the
factors are rounded to the type of x and not x widened to theirs, and h and dh lie on their sides, so that the
part of each linear is a piece of memory and needs no copy. The factors' gradients come in the type of x, in
which they were computed, and are widened once, all together (`optim.as_vectors`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn


class LowRank(NamedTuple):
    """y = x W^T + bias + scale * (x A) B."""

    weight_OI: mx.array
    bias_O: mx.array | None
    a_IR: mx.array
    b_RO: mx.array
    scale: float


def project(x_BTI: mx.array, *linears: nn.Module) -> list[mx.array]:
    """[linear(x) for linear in linears], those that are plain LoRA by one function."""
    low_ranks = {j: parts for j, linear in enumerate(linears) if (parts := low_rank_of(linear))}
    y_of: dict[int, mx.array] = {}
    if low_ranks:
        y_of = dict(zip(low_ranks, products(x_BTI.flatten(0, -2), [*low_ranks.values()]), strict=True))
    shape = x_BTI.shape[:-1]
    return [y_of[j].reshape(*shape, -1) if j in y_of else linear(x_BTI) for j, linear in enumerate(linears)]


def low_rank_of(linear: nn.Module) -> LowRank | None:
    return cast(LowRank | None, linear.low_rank()) if hasattr(linear, "low_rank") else None


def products(x_NI: mx.array, parts: list[LowRank]) -> list[mx.array]:
    """y_j of each part; differentiable by x and by the factors, not by weights and biases."""
    num = len(parts)
    rows = [slice(*ends) for ends in pairwise(accumulate((p.a_IR.shape[1] for p in parts), initial=0))]

    @mx.custom_function  # type: ignore[untyped-decorator]
    def forward(x_NI: mx.array, *factors: mx.array) -> list[mx.array]:
        a_RI, bs_RO = rounded(parts, factors, x_NI.dtype)
        h_RN = a_RI @ x_NI.T
        lows_NO = [h_RN[of_part].T @ b_RO for of_part, b_RO in zip(rows, bs_RO, strict=True)]
        return [*(with_base(low_NO, x_NI, part) for low_NO, part in zip(lows_NO, parts, strict=True)), h_RN]

    @forward.vjp  # type: ignore[untyped-decorator]
    def backward(primals: tuple, cotangents: tuple, outputs: tuple) -> list[mx.array]:
        x_NI, *factors = primals
        dys_NO, h_RN = cotangents[:num], outputs[num]  # h is an output so that it need not be made again
        a_RI, bs_RO = rounded(parts, factors, x_NI.dtype)
        dh_RN = mx.concatenate([b_RO @ dy_NO.T for b_RO, dy_NO in zip(bs_RO, dys_NO, strict=True)])
        da_RI = (scale_of(parts) * (dh_RN @ x_NI)).astype(x_NI.dtype)
        dbs_RO = [h_RN[of_part] @ dy_NO for of_part, dy_NO in zip(rows, dys_NO, strict=True)]
        gradients = [*(da_RI[of_part].T for of_part in rows), *dbs_RO]
        # The factors' gradients first: MLX would else keep x and every dy until the end of the backward pass.
        (dh_RN,) = mx.depends([dh_RN], gradients)
        dx_NI = dh_RN.T @ a_RI
        for dy_NO, part in zip(dys_NO, parts, strict=True):
            dx_NI = mx.addmm(dx_NI, dy_NO, part.weight_OI)
        return [dx_NI, *gradients]

    factors = [part.a_IR for part in parts] + [part.b_RO for part in parts]
    return list(forward(x_NI, *factors))[:num]


def rounded(
    parts: list[LowRank], factors: Sequence[mx.array], dtype: mx.Dtype
) -> tuple[mx.array, list[mx.array]]:
    """[s_1 A_1 ... s_n A_n]^T and each B_j, in the type of x."""
    a_RI = mx.concatenate([a_IR.T for a_IR in factors[: len(parts)]])
    return (scale_of(parts) * a_RI).astype(dtype), [b_RO.astype(dtype) for b_RO in factors[len(parts) :]]


def scale_of(parts: list[LowRank]) -> float | mx.array:
    """The one scale, or of each row of [A_1 ... A_n]^T its own."""
    if len({part.scale for part in parts}) == 1:
        return parts[0].scale
    return mx.array([[part.scale] for part in parts for _ in range(part.a_IR.shape[1])], parts[0].a_IR.dtype)


def with_base(low_NO: mx.array, x_NI: mx.array, part: LowRank) -> mx.array:
    """x W^T + bias + the low-rank update."""
    y_NO = mx.addmm(low_NO, x_NI, part.weight_OI.T)
    return y_NO if part.bias_O is None else y_NO + part.bias_O
