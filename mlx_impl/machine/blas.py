"""An optimized BLAS for MLX's CPU matmuls on Linux, loaded before MLX is imported.

`mlx[cpu]` for Linux links the netlib reference BLAS (5 GFLOP/s on two cores). The dynamic linker searches the
global scope first (dlopen(3), RTLD_GLOBAL), so a library loaded there before `import mlx.core` replaces the
`cblas_sgemm` that `libmlx.so` calls, or the `sgemm_` that netlib's `cblas_sgemm` calls in turn.

No counterpart in `reference/`: PyTorch has its own BLAS. A library loaded here also replaces the `sgemm_` of
a PyTorch imported later. Then MLX and PyTorch may agree bit-exactly only because both call this library, so
comparisons of the two use "off".
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

from .launcher import launched_rank

ENVIRONMENT_VARIABLE = "MLX_IMPL_BLAS"
OPENBLAS = (
    "libopenblasp.so.0",  # Fedora's with threads; its libopenblas.so.0 has none
    "libopenblas.so.0",  # Debian's, with threads
)
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class BlasChoice:
    """The BLAS of MLX's CPU matmuls; `name` and `path` are None for the one that MLX brings."""

    name: str | None
    path: str | None
    sentence: str  # says so in one line


_loaded: BlasChoice | None = None  # a library in the global scope cannot be unloaded


def load_optimized_blas(choice: str | None = None) -> BlasChoice:
    """Load the best BLAS found ("auto"), none ("off") or the library at a path. Call it before importing MLX.

    The default is the environment variable MLX_IMPL_BLAS, or else "auto". Once a library is loaded, every
    later call returns it. Raises ValueError for an unusable library; warns if MLX is already imported.
    """
    global _loaded
    wanted = choice or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if sys.platform != "linux":
        return _mlx_blas(f"nothing to load on {sys.platform}, only MLX for Linux needs one")
    if _loaded is not None:
        return _loaded
    if wanted == "off":
        return _mlx_blas("MLX's own, because an optimized one was turned off")
    if "mlx.core" in sys.modules:
        reason = "MLX's own, because MLX was imported before an optimized one could be loaded"
        warnings.warn(f"BLAS for MLX's CPU matmuls: {reason}.", RuntimeWarning, stacklevel=2)
        return _mlx_blas(reason)
    _let_threads_sleep_on_a_rank()
    _loaded = _first_loadable() if wanted == "auto" else _load_given(wanted)
    return _loaded or _mlx_blas(
        "MLX's own, about 25-50 times slower than an optimized one; no other was found, install one: "
        + ("`pip install mkl` or " if platform.machine() == "x86_64" else "")
        + "`apt install libopenblas0`"
    )


def _let_threads_sleep_on_a_rank() -> None:
    """OpenMP's threads spin for 200 ms after their last work, on cores that the ranks of a machine share.

    Fewer threads would help as much, but the bits of some products depend on their number.
    """
    variables = ("KMP_BLOCKTIME", "OMP_WAIT_POLICY")
    if launched_rank() is not None and not any(os.environ.get(name) for name in variables):
        os.environ["KMP_BLOCKTIME"] = "0"


def _mlx_blas(reason: str) -> BlasChoice:
    return BlasChoice(None, None, f"BLAS for MLX's CPU matmuls: {reason}.")


def _loaded_blas(name: str, path: str) -> BlasChoice:
    return BlasChoice(name, path, f"BLAS for MLX's CPU matmuls: {name} ({path}).")


def _first_loadable() -> BlasChoice | None:
    for name, path in _candidates():
        try:
            _load_globally(path)
        except OSError:
            continue
        return _loaded_blas(name, path)
    return None


def _load_given(path: str) -> BlasChoice:
    try:
        _load_globally(path)
    except OSError as error:
        raise ValueError(
            f"the BLAS (argument or {ENVIRONMENT_VARIABLE}) must be 'auto', 'off' or a loadable "
            f"library whose `sgemm_` takes 32-bit integers, got {path!r}: {error}"
        ) from error
    return _loaded_blas(Path(path).name, path)


def _candidates() -> Iterator[tuple[str, str]]:
    """(name, argument for dlopen), fastest first.

    Measured on two cores: on an Intel processor MKL reached 300-325 GFLOP/s and OpenBLAS 200-285; on an AMD,
    for which MKL has fewer kernels, MKL 95-120 and OpenBLAS 145-165. PyTorch's is MKL with GNU OpenMP: as
    fast on idle cores, but two to three times slower when other processes use them, and it maps 0.4 GB.
    """
    mkl = [("MKL", path) for path in _mkl_paths()]
    openblas = [("OpenBLAS", name) for name in OPENBLAS]
    yield from openblas + mkl if _is_amd() else mkl + openblas
    spec = importlib.util.find_spec("torch")  # does not import PyTorch
    for folder in (spec.submodule_search_locations if spec else None) or ():
        yield "PyTorch's", str(Path(folder, "lib", "libtorch_cpu.so"))


def _is_amd() -> bool:
    return CPUINFO.is_file() and "AuthenticAMD" in CPUINFO.read_text(encoding="utf-8", errors="replace")


def _mkl_paths() -> list[str]:
    """Possible paths of `libmkl_rt`: those of the installed wheel, then the system's names."""
    try:
        files = importlib.metadata.files("mkl") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    from_wheel = [os.path.abspath(f.locate()) for f in files if f.name.startswith("libmkl_rt.so")]
    return [*from_wheel, "libmkl_rt.so.3", "libmkl_rt.so.2", "libmkl_rt.so"]


def _load_globally(path: str) -> None:
    """Load a library into the global scope; OSError, and nothing loaded there, if it is unusable."""
    library = ctypes.CDLL(path)  # local at first: an unusable library must not replace any symbol
    if not (hasattr(library, "sgemm_") and hasattr(library, "scopy_")):
        raise OSError("it lacks the symbol sgemm_ or scopy_")
    if hasattr(library, "MKL_Set_Interface_Layer"):
        library.MKL_Set_Interface_Layer(0)  # LP64, whatever MKL_INTERFACE_LAYER says
    if not _has_32_bit_integers(library):
        raise OSError("its integers have 64 bits")
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def _has_32_bit_integers(library: ctypes.CDLL) -> bool:
    """Whether `scopy_` copies two floats for the count 2 - 2**32: in 32 bits it is 2, in 64 negative."""
    count, stride = ctypes.c_int64(2 - 2**32), ctypes.c_int64(1)
    source, target = (ctypes.c_float * 2)(1, 2), (ctypes.c_float * 2)()
    library.scopy_(ctypes.byref(count), source, ctypes.byref(stride), target, ctypes.byref(stride))
    return list(target) == list(source)
