"""Linears of one input together, with the gradient of their low-rank updates written out.

For x of N rows, frozen W_j, and trained A_j, B_j, with the scale in B_j:

    h_j = x A_j        y_j = x W_j^T + h_j B_j        (all A_j side by side: one matmul)
    dh_j = dy_j B_j^T  dx = sum_j dy_j W_j + dh_j A_j^T    dA_j = x^T dh_j    dB_j = h_j^T dy_j

Automatic differentiation of `LoRALinear.__call__`, which the tests compare with, gives the same numbers with
more passes over memory: here every sum is formed by the matmul that makes its last term (`mx.addmm`), and the
factors are rounded to the type of x, not x widened to theirs. Source: Hu et al. 2021, "LoRA", eq. 3.
"""

from __future__ import annotations

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
    y_BTO_of = {}
    low_ranks = {j: parts for j, linear in enumerate(linears) if (parts := low_rank_of(linear))}
    if low_ranks:
        y_NO_all = low_rank_products(x_BTI.reshape(-1, x_BTI.shape[-1]), list(low_ranks.values()))
        y_BTO_of = {
            j: y_NO.reshape(*x_BTI.shape[:-1], -1) for j, y_NO in zip(low_ranks, y_NO_all, strict=True)
        }
    return [y_BTO_of[j] if j in y_BTO_of else linear(x_BTI) for j, linear in enumerate(linears)]


def low_rank_of(linear: nn.Module) -> LowRank | None:
    return cast(LowRank | None, linear.low_rank()) if hasattr(linear, "low_rank") else None


def low_rank_products(x_NI: mx.array, parts: list[LowRank]) -> list[mx.array]:
    """y_j of each part; differentiable by x and by the factors, not by weights and biases."""
    dtype, num = x_NI.dtype, len(parts)
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + part.a_IR.shape[1])

    def rounded(factors: tuple[mx.array, ...]) -> tuple[mx.array, list[mx.array]]:
        """[A_1 ... A_n] and each scale * B_j, in the type of x."""
        scaled = [part.scale * b_RO for part, b_RO in zip(parts, factors[num:], strict=True)]
        return mx.concatenate(factors[:num], axis=1).astype(dtype), [b_RO.astype(dtype) for b_RO in scaled]

    @mx.custom_function
    def products(x_NI: mx.array, *factors: mx.array) -> list[mx.array]:
        a_IR, bs_RO = rounded(factors)
        h_NR = x_NI @ a_IR
        ys_NO = []
        for j, (part, b_RO) in enumerate(zip(parts, bs_RO, strict=True)):
            h_j = h_NR[:, ends[j] : ends[j + 1]]
            update_NO = h_j @ b_RO if part.bias_O is None else mx.addmm(part.bias_O, h_j, b_RO)
            ys_NO.append(mx.addmm(update_NO, x_NI, part.weight_OI.T))
        return [*ys_NO, h_NR]  # h too, so that the gradient need not make it again

    @products.vjp
    def gradient(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple[mx.array, ...]:
        x_NI, *factors = primals
        dys_NO, h_NR = cotangents[:num], outputs[num]
        a_IR, bs_RO = rounded(tuple(factors))
        dh_NR = mx.concatenate([dy_NO @ b_RO.T for dy_NO, b_RO in zip(dys_NO, bs_RO, strict=True)], axis=1)
        dx_NI = dh_NR @ a_IR.T
        for dy_NO, part in zip(dys_NO, parts, strict=True):
            dx_NI = mx.addmm(dx_NI, dy_NO, part.weight_OI)
        da_IR = x_NI.T @ dh_NR
        das = [da_IR[:, ends[j] : ends[j + 1]].astype(factors[j].dtype) for j in range(num)]
        dbs = [
            part.scale * (h_NR[:, ends[j] : ends[j + 1]].T @ dys_NO[j]).astype(factors[num + j].dtype)
            for j, part in enumerate(parts)
        ]
        # The factors' gradients first: MLX would else keep x and every dy until the end of the backward pass.
        return *mx.depends([dx_NI], [*das, *dbs]), *das, *dbs

    factors = [part.a_IR for part in parts] + [part.b_RO for part in parts]
    return list(products(x_NI, *factors))[:num]
