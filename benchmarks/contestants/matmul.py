"""One large matrix multiplication in MLX. Its rate defines the floor and the MFU."""

from __future__ import annotations

import mlx.core as mx

from benchmarks.cases import Case
from benchmarks.flops import MATMUL_SIZES
from benchmarks.inputs import Inputs


class Matmul:
    def __init__(self, inputs: Inputs, case: Case) -> None:
        size = MATMUL_SIZES[mx.default_device() == mx.gpu]
        self.x_NN, self.y_NN = mx.random.normal((2, size, size)).astype(getattr(mx, case.dtype))
        mx.eval(self.x_NN, self.y_NN)

    def step(self) -> float:
        mx.eval(self.x_NN @ self.y_NN)
        mx.synchronize()
        return 0.0


build = Matmul
