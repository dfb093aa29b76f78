"""Write a GGUF file tensor by tensor, with the `gguf` package.

A tensor with one axis is stored in float32, as llama.cpp's own conversion does: its kernels expect norms and
biases in that type.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np

from ...config import ModelConfig
from .gguf import HEADS, ROPE_FACTORS, hugging_face_name, stored_shapes
from .gguf_config_writer import rope_factors

ARCHITECTURE = "general.architecture"
TYPES = {  # GGUF's type of a tensor, and of a file whose matrices have it
    mx.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    mx.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    mx.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
MAX_UINT32 = 2**32 - 1
TensorInfos = Mapping[str, tuple[tuple[int, ...], mx.Dtype]]


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    infos: TensorInfos,
    arrays: Iterable[np.ndarray],
) -> None:
    """Write the file; `infos` are shape and dtype of each tensor by name, `arrays` the values in order."""
    writer = gguf.GGUFWriter(path, str(metadata[ARCHITECTURE]))
    try:
        for key, value in metadata.items():
            if key != ARCHITECTURE:  # the writer has written it
                add_value(writer, key, value)
        for name, (shape, dtype) in infos.items():
            num_bytes = int(np.prod(shape)) * dtype.size
            writer.add_tensor_info(name, shape, np.dtype(np.void), num_bytes, TYPES[dtype][0])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in arrays:
            writer.write_tensor_data(array)
    except OSError as error:
        if error.errno is not None:
            raise
        reason = f"no space is left for it, or no more may be written: {error}"  # NumPy gives no number
        raise OSError(errno.ENOSPC, reason) from None
    finally:
        writer.close()


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a key in the type that llama.cpp reads it in; ValueError for an integer of more than 64 bits."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"{key} cannot be written to a GGUF file, got {value}: integers have 64 bits")
        add = (
            writer.add_int64 if value < 0 else writer.add_uint32 if value <= MAX_UINT32 else writer.add_uint64
        )
        add(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def tensor_infos(config: ModelConfig, dtype_of: Callable[[str], mx.Dtype]) -> TensorInfos:
    """Shape and dtype of every tensor under llama.cpp's name; `dtype_of` is asked Hugging Face's names."""
    infos = {
        name: (shape, mx.float32 if len(shape) == 1 else dtype_of(hugging_face_name(name)))
        for name, shape in stored_shapes(config).items()
    }
    factors_P = rope_factors(config)
    return infos if factors_P is None else {ROPE_FACTORS: (factors_P.shape, mx.float32), **infos}


def to_llama_cpp(name: str, array: mx.array, config: ModelConfig, is_llama: bool) -> np.ndarray:
    """The values of a tensor as llama.cpp stores them; for `llama` with the rows of Q and K in its order."""
    numbers = np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
    num_heads = next((getattr(config, field) for part, field in HEADS.items() if part in name), None)
    if is_llama and num_heads is not None:
        numbers = permute(numbers, num_heads)
    return np.ascontiguousarray(numbers)


def permute(weight_OI: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows that are K/2 apart become neighbours: llama.cpp rotates neighbouring pairs (interleaved RoPE)."""
    halves = weight_OI.reshape(num_heads, 2, -1, *weight_OI.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight_OI.shape)
