"""An optimized BLAS for MLX's CPU matmuls on Linux, loaded before MLX is imported.

`mlx[cpu]` for Linux links the netlib reference BLAS (5 GFLOP/s on two cores). The dynamic linker
looks in the global scope first (dlopen(3), RTLD_GLOBAL), so a library loaded there before `import
mlx.core` takes over the `cblas_sgemm` that `libmlx.so` calls, or the `sgemm_` that netlib's
`cblas_sgemm` calls in turn.

No twin in `reference/`: PyTorch brings its own BLAS. But what is loaded here also takes over the
`sgemm_` of a PyTorch that is imported later, so that MLX and PyTorch can agree to the byte for the
wrong reason: a comparison of the two wants it "off".
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT_VARIABLE = "MLX_IMPL_BLAS"
# Fedora's with threads, where the other has none; Debian's.
OPENBLAS = ("libopenblasp.so.0", "libopenblas.so.0")
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class BlasChoice:
    """What runs MLX's CPU matmuls; `name` and `path` are None where MLX keeps its own BLAS."""

    name: str | None
    path: str | None
    sentence: str  # one line for a person


_loaded: BlasChoice | None = None  # what is in the global scope stays there to the end


def load_optimized_blas(choice: str | None = None) -> BlasChoice:
    """Load the best BLAS present ("auto"), none ("off") or the library at a path; then import MLX.

    Without an argument the environment variable MLX_IMPL_BLAS decides, and without that "auto".
    Once one is loaded every later call returns it. Raises ValueError for a library that cannot
    serve; warns if MLX was imported first.
    """
    global _loaded
    wanted = choice or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if sys.platform != "linux":
        return _kept(f"nothing to load on {sys.platform}, only MLX for Linux needs one")
    if _loaded is not None:
        return _loaded
    if wanted == "off":
        return _kept("MLX's own, since an optimized one was turned off")
    if "mlx.core" in sys.modules:
        reason = "MLX's own, since MLX was imported before an optimized one could be loaded"
        warnings.warn(f"BLAS for MLX's CPU matmuls: {reason}.", RuntimeWarning, stacklevel=2)
        return _kept(reason)
    _loaded = _first_loadable() if wanted == "auto" else _load_given(wanted)
    return _loaded or _kept(
        "MLX's own, about 25-50 times slower than an optimized one; none was found, install one: "
        + ("`pip install mkl` or " if platform.machine() == "x86_64" else "")
        + "`apt install libopenblas0`"
    )


def _kept(sentence: str) -> BlasChoice:
    return BlasChoice(None, None, f"BLAS for MLX's CPU matmuls: {sentence}.")


def _taken(name: str, path: str) -> BlasChoice:
    return BlasChoice(name, path, f"BLAS for MLX's CPU matmuls: {name} ({path}).")


def _first_loadable() -> BlasChoice | None:
    for name, path in _candidates():
        try:
            _load_globally(path)
        except OSError:
            continue
        return _taken(name, path)
    return None


def _load_given(path: str) -> BlasChoice:
    try:
        _load_globally(path)
    except OSError as error:
        raise ValueError(
            f"the BLAS (argument or {ENVIRONMENT_VARIABLE}) must be 'auto', 'off' or a loadable "
            f"library whose `sgemm_` takes 32-bit integers, got {path!r}: {error}"
        ) from error
    return _taken(Path(path).name, path)


def _candidates() -> Iterator[tuple[str, str]]:
    """(name, what dlopen takes), best first.

    On an Intel processor MKL ran 300-325 GFLOP/s where OpenBLAS ran 200-285; on an AMD, for which MKL has
    fewer kernels, 95-120 where OpenBLAS ran 145-165, both on two cores. PyTorch's is an MKL on GNU OpenMP: as
    fast on idle cores, but two to three times slower once another process wants them, and 0.4 GB to map.
    """
    mkl = [("MKL", path) for path in _mkl_paths()]
    openblas = [("OpenBLAS", name) for name in OPENBLAS]
    yield from openblas + mkl if _is_amd() else mkl + openblas
    spec = importlib.util.find_spec("torch")  # does not import it
    for folder in (spec.submodule_search_locations if spec else None) or ():
        yield "PyTorch's", str(Path(folder, "lib", "libtorch_cpu.so"))


def _is_amd() -> bool:
    return CPUINFO.is_file() and "AuthenticAMD" in CPUINFO.read_text(encoding="utf-8", errors="replace")


def _mkl_paths() -> list[str]:
    """Where `libmkl_rt` may be: where its wheel's record says, then the system's."""
    try:
        files = importlib.metadata.files("mkl") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    of_wheel = [os.path.abspath(f.locate()) for f in files if f.name.startswith("libmkl_rt.so")]
    return [*of_wheel, "libmkl_rt.so.3", "libmkl_rt.so.2", "libmkl_rt.so"]


def _load_globally(path: str) -> None:
    """Put a library before MLX's own; OSError, and nothing taken over, if it cannot serve."""
    library = ctypes.CDLL(path)  # local at first: what is refused below must take over nothing
    if not (hasattr(library, "sgemm_") and hasattr(library, "scopy_")):
        raise OSError("it has no such symbol")
    if hasattr(library, "MKL_Set_Interface_Layer"):
        library.MKL_Set_Interface_Layer(0)  # LP64, whatever MKL_INTERFACE_LAYER says
    if not _has_32_bit_integers(library):
        raise OSError("its integers have 64 bits")
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def _has_32_bit_integers(library: ctypes.CDLL) -> bool:
    """Whether `scopy_` copies two floats when told 2 - 2**32: 2 in 32 bits, none in 64."""
    count, stride = ctypes.c_int64(2 - 2**32), ctypes.c_int64(1)
    source, target = (ctypes.c_float * 2)(1, 2), (ctypes.c_float * 2)()
    library.scopy_(ctypes.byref(count), source, ctypes.byref(stride), target, ctypes.byref(stride))
    return list(target) == list(source)
