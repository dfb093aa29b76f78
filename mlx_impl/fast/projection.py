"""Linears of one input together, with the gradient of their low-rank updates written out.

For x of N rows, frozen W_j, trained A_j and B_j, and scales s_j (Hu et al. 2021, "LoRA", eq. 3):

    h_j = s_j x A_j            y_j = x W_j^T + h_j B_j          (all A_j side by side: one matmul)
    dh_j = s_j dy_j B_j^T      dx = sum_j dy_j W_j + dh_j A_j^T
    dA_j = x^T dh_j            dB_j = h_j^T dy_j

Automatic differentiation of `LoRALinear.__call__` gives the same numbers with more passes over memory. Here
`mx.addmm` adds within the matmul, the factors are cast to the type of x (x is not widened to theirs), and h
and dh are kept transposed, so that each linear's slice is contiguous. The factors' gradients have the type of
x, and are widened all at once (`vectors.as_vectors`). Linears of DoRA are among them: y_j m / |V|, with the
length of each row of V (`row_lengths.py`), then the bias. Under dropout every A_j gets its own x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import mlx.core as mx
import mlx.nn as nn

from ..lora import LoRALinear
from . import cpu_ops, ops, packed
from .low_rank import LowRank, low_rank_of
from .packed import add_gradient, add_product, ready, unpacked
from .rounded import rounded_factors
from .row_lengths import row_lengths


def project(x_BTI: mx.array, *linears: nn.Module) -> list[mx.array]:
    """[linear(x) for linear in linears]; the plain LoRA ones are computed together."""
    low_ranks = {j: parts for j, linear in enumerate(linears) if (parts := low_rank_of(linear))}
    y_of: dict[int, mx.array] = {}
    if low_ranks:
        y_of = dict(zip(low_ranks, products(x_BTI, [*low_ranks.values()]), strict=True))
    shape = x_BTI.shape[:-1]
    return [
        y_of[j].reshape(*shape, -1) if j in y_of else plain_call(linear, x_BTI)
        for j, linear in enumerate(linears)
    ]


def plain_call(linear: nn.Module, x_BTI: mx.array) -> mx.array:
    """linear(x), with A in memory as A^T; `cast_factors` says why."""
    if not isinstance(linear, LoRALinear):
        return packed.call(linear, x_BTI)
    a_IR = linear.lora_a
    linear.lora_a = mx.contiguous(a_IR.T).T
    try:
        return packed.call(linear, x_BTI)
    finally:
        linear.lora_a = a_IR


def project_gated(gate_BTF: mx.array, up_BTF: mx.array, linear: nn.Module) -> mx.array:
    """linear(silu(gate) * up); on a CPU the product is recomputed for the gradient instead of kept."""
    low_rank = low_rank_of(linear)
    if ops.on_gpu() or low_rank is None or low_rank.dropout is not None:
        return project(ops.gated(gate_BTF, up_BTF), linear)[0]
    joint = JointLinears([low_rank], gate_BTF.dtype)

    @mx.custom_function
    def forward(gate_NF: mx.array, up_NF: mx.array, *factors: mx.array) -> list[mx.array]:
        product_NF, s_NF = cpu_ops.gate(gate_NF, up_NF)
        return [*joint.forward(product_NF, [], factors), s_NF]

    @forward.vjp
    def backward(primals: tuple, cotangents: tuple, outputs: tuple) -> list[mx.array]:
        gate_NF, up_NF = mx.depends(list(primals[:2]), [cotangents[0]])  # not before its gradient is here
        product_NF = cpu_ops.gate_product(gate_NF, up_NF, outputs[-1])
        d_NF, *gradients = joint.backward(product_NF, [], cotangents, outputs)
        return [*cpu_ops.gate_gradient(gate_NF, up_NF, outputs[-1], d_NF), *gradients]

    outputs = forward(gate_BTF.flatten(0, -2), up_BTF.flatten(0, -2), *joint.factors)
    return mx.unflatten(joint.finish(outputs)[0], 0, gate_BTF.shape[:-1])


def products(x_BTI: mx.array, parts: list[LowRank]) -> list[mx.array]:
    """y_j (N, O) of each part; differentiable by x and by the factors, not by weights and biases."""
    joint = JointLinears(parts, x_BTI.dtype)
    dropped: list[mx.array] = []
    if any(part.dropout is not None for part in parts):
        dropped = [x_BTI if part.dropout is None else part.dropout(x_BTI) for part in parts]
    num = len(dropped)

    @mx.custom_function
    def forward(x_NI: mx.array, *others: mx.array) -> list[mx.array]:
        return joint.forward(x_NI, others[:num], others[num:])

    @forward.vjp
    def backward(primals: tuple, cotangents: tuple, outputs: tuple) -> list[mx.array]:
        return joint.backward(primals[0], primals[1 : num + 1], cotangents, outputs)

    return joint.finish(forward(x_BTI.flatten(0, -2), *(x.flatten(0, -2) for x in dropped), *joint.factors))


class JointLinears:
    """Linears of one input: their outputs, and the gradients of the input and of the factors."""

    def __init__(self, parts: list[LowRank], dtype: mx.Dtype) -> None:
        """`dtype` is the type of the input."""
        self.parts = parts
        as_IR, bs_RO = [part.a_IR for part in parts], [part.b_RO for part in parts]
        self.factors = [*as_IR, *bs_RO]
        self.rounded = rounded_factors([part.rounded for part in parts], as_IR, bs_RO, dtype)
        ends = accumulate((part.a_IR.shape[1] for part in parts), initial=0)
        self.rows = [slice(*of_part) for of_part in pairwise(ends)]

    def forward(
        self, x_NI: mx.array, dropped: Sequence[mx.array], factors: Sequence[mx.array]
    ) -> list[mx.array]:
        """Each x V^T; the lengths of DoRA's rows; h; and where they are not rounded, A^T and each B, cast."""
        if self.rounded:
            first_RI, bs_RO, cast = self.rounded.scaled_a_RI, self.rounded.bs_RO, list[mx.array]()
        else:
            first_RI, bs_RO = cast_factors(factors, x_NI.dtype)
            cast = [first_RI, *bs_RO]
        h_RN = self.of_rows(lambda rows, x_NI: first_RI[rows] @ x_NI.T, x_NI, dropped)
        h_RN = h_RN if self.rounded else times_scale(h_RN, self.parts)
        lows_NO = [h_RN[of_part].T @ b_RO for of_part, b_RO in zip(self.rows, bs_RO, strict=True)]
        ys_NO: list[mx.array] = []
        lengths_O: list[mx.array] = []
        for j, part in enumerate(self.parts):
            before = ys_NO[-1] if ys_NO else x_NI  # one weight in full at a time
            weight = ready(part.weight_OI, len(x_NI), after=before)
            y_NO = add_product(lows_NO[j], x_NI, weight)
            if part.magnitude_O is not None:
                full_OI = unpacked(weight, after=y_NO)
                a_IR, b_RO = factors[j], factors[len(self.parts) + j]  # not rounded
                lengths_O.append(row_lengths(full_OI, a_IR, b_RO, part.scale))
                (y_NO,) = mx.depends([y_NO], [lengths_O[-1]])
            ys_NO.append(y_NO)
        return [*ys_NO, *lengths_O, h_RN, *cast]

    def finish(self, outputs: Sequence[mx.array]) -> list[mx.array]:
        """Each y, of the outputs of `forward`."""
        num = len(self.parts)
        lengths_O = iter(outputs[num:])
        return [part.finish(y_NO, lengths_O) for part, y_NO in zip(self.parts, outputs[:num], strict=True)]

    def backward(
        self,
        x_NI: mx.array,
        dropped: Sequence[mx.array],
        dys: Sequence[mx.array],
        outputs: Sequence[mx.array],
    ) -> list[mx.array]:
        """The gradients of x, of what dropout left of it for each A, if it is on, and of the factors."""
        num = len(self.parts)
        h_RN, *cast = outputs[num + sum(part.magnitude_O is not None for part in self.parts) :]
        if self.rounded:
            cast = [self.rounded.a_RI, *self.rounded.scaled_bs_RO]
        dys_NO, (a_RI, *bs_RO) = dys[:num], cast[: num + 1]
        dh_RN = mx.concatenate([b_RO @ dy_NO.T for b_RO, dy_NO in zip(bs_RO, dys_NO, strict=True)])
        dh_RN = dh_RN if self.rounded else times_scale(dh_RN, self.parts)
        da_RI = self.of_rows(lambda rows, x_NI: dh_RN[rows] @ x_NI, x_NI, dropped)
        dbs_RO = [h_RN[of_part] @ dy_NO for of_part, dy_NO in zip(self.rows, dys_NO, strict=True)]
        gradients = [*(da_RI[of_part].T for of_part in self.rows), *dbs_RO]
        # The factors' gradients first: otherwise MLX keeps x and every dy until the backward pass ends.
        (dh_NR,) = mx.depends([dh_RN.T], gradients)
        of_dropped = [dh_NR[:, rows] @ a_RI[rows] for rows in self.rows] if dropped else []
        dx_NI = None if dropped else dh_NR @ a_RI
        for dy_NO, part in zip(dys_NO, self.parts, strict=True):
            dx_NI = add_gradient(dx_NI, dy_NO, part.weight_OI)
        return [dx_NI, *of_dropped, *gradients]

    def of_rows(
        self, product: Callable[[slice, mx.array], mx.array], x_NI: mx.array, dropped: Sequence[mx.array]
    ) -> mx.array:
        """A product of all ranks with x; under dropout of each part's ranks with what it left of x."""
        if not dropped:
            return product(slice(None), x_NI)
        return mx.concatenate([product(*of_part) for of_part in zip(self.rows, dropped, strict=True)])


def cast_factors(factors: Sequence[mx.array], dtype: mx.Dtype) -> tuple[mx.array, list[mx.array]]:
    """[A_1 ... A_n]^T and each B_j, in the type of x.

    A is always in memory as A^T, as `vectors.as_factors` has it: a GPU or an optimized BLAS may round a
    transposed matrix's product differently, and loaded factors would give other bits than updated ones.
    """
    num = len(factors) // 2
    a_RI = mx.concatenate([a_IR.T for a_IR in factors[:num]]) if num > 1 else mx.contiguous(factors[0].T)
    return a_RI.astype(dtype), [b_RO.astype(dtype) for b_RO in factors[num:]]


def times_scale(h_RN: mx.array, parts: list[LowRank]) -> mx.array:
    """Each linear's rows times its scale."""
    if len({part.scale for part in parts}) == 1:
        return ops.scaled(parts[0].scale, h_RN)
    scale_R1 = [[part.scale] for part in parts for _ in range(part.a_IR.shape[1])]
    return ops.scaled(mx.array(scale_R1, h_RN.dtype), h_RN)
