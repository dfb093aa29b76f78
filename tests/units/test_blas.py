"""`mlx_impl.machine.blas`: which BLAS runs MLX's CPU matmuls, shown by the dynamic linker's own log."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest

from mlx_impl.machine import blas

NAMES = ("MKL", "OpenBLAS", "PyTorch's")
ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, **environment: str) -> Any:
    """Run `code` in a new process and return the JSON that it prints last."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLX_IMPL_", "LD_DEBUG"))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**clean, **environment})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


MULTIPLY = """
import json, sys
from mlx_impl.machine.blas import load_optimized_blas
first, second = load_optimized_blas(), load_optimized_blas()
import mlx.core as mx
import numpy as np
a, b = (np.random.default_rng(0).normal(size=s).astype(np.float32) for s in ((70, 90), (90, 50)))
exact = a.astype(np.float64) @ b
scale = np.abs(a).astype(np.float64) @ np.abs(b)
def error(product): return float((np.abs(np.asarray(product) - exact) / scale).max())
with mx.stream(mx.cpu):
    errors = {"mlx": error(mx.array(a) @ mx.array(b))}
if TORCH:
    import torch
    errors["torch"] = error(torch.from_numpy(a) @ torch.from_numpy(b))
    with mx.stream(mx.cpu):
        errors["mlx, after torch"] = error(mx.array(a) @ mx.array(b))
print(json.dumps({"path": first.path, "same": first is second, "errors": errors}))
"""
BOUND = 90 * 2.0**-24  # |fl(AB) - AB| <= k u |A||B| (Higham, Accuracy and Stability, 3.13)


@pytest.fixture(scope="module")
def installed() -> dict[str, str]:
    """The optimized BLAS libraries of this machine by name, found in a separate process."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        pytest.skip("the proof is glibc's LD_DEBUG=bindings")
    try:
        importlib.metadata.version("mlx-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("this MLX is not the CPU wheel, which brings netlib's BLAS")
    return dict(
        run_python(
            "import ctypes, json\n"
            "from mlx_impl.machine import blas\n"
            "found = {}\n"
            "for name, path in blas._candidates():\n"
            "    try:\n"
            "        ctypes.CDLL(path).sgemm_\n"
            "        found.setdefault(name, path)\n"
            "    except (OSError, AttributeError):\n"
            "        pass\n"
            "print(json.dumps(found))"
        )
    )


@pytest.fixture(params=NAMES)
def path(request: pytest.FixtureRequest, installed: dict[str, str]) -> str:
    if request.param not in installed:
        pytest.skip(f"{request.param} BLAS is not installed here")
    return installed[request.param]


def file_that_multiplies(choice: str, tmp_path: Path) -> Path:
    """The file that libmlx's `cblas_sgemm` is bound to; for netlib's wrapper, the file of its `sgemm_`."""
    code = MULTIPLY.replace("TORCH", "False")
    run_python(code, MLX_IMPL_BLAS=choice, LD_DEBUG="bindings", LD_DEBUG_OUTPUT=str(tmp_path / "log"))
    pattern = re.compile(r"binding file (\S+) \[0\] to (\S+) \[0\]: .* symbol `(cblas_sgemm|sgemm_)'")
    bound: dict[tuple[str, str], Path] = {}
    for log in tmp_path.glob("log.*"):
        with log.open(errors="replace") as lines:
            for found in filter(None, (pattern.search(line) for line in lines if "gemm" in line)):
                bound[Path(found[1]).name, found[3]] = Path(found[2])
    file = bound["libmlx.so", "cblas_sgemm"]
    return bound[file.name, "sgemm_"] if file.parent.name == "mlx_cpu.libs" else file


def family(path: str | Path) -> str:
    """`libmkl` of `libmkl_rt.so.3`, which loads `libmkl_intel_lp64.so.3` to do the work."""
    return re.split(r"[_.]", Path(path).name)[0].removesuffix("p")  # Fedora's libopenblasp


def test_the_chosen_library_runs_mlx_s_matmul(path: str, tmp_path: Path) -> None:
    """The dynamic linker binds MLX's sgemm to the requested library."""
    assert family(file_that_multiplies(path, tmp_path)) == family(path)


def test_off_leaves_the_matmul_to_mlx_s_own_blas(installed: dict[str, str], tmp_path: Path) -> None:
    """The control: with "off" the same log names the netlib BLAS of MLX's wheel."""
    assert file_that_multiplies("off", tmp_path).parent.name == "mlx_cpu.libs"


@pytest.mark.parametrize(
    ("vendor", "order"),
    [("GenuineIntel", ["MKL", "OpenBLAS"]), ("AuthenticAMD", ["OpenBLAS", "MKL"])],
)
def test_the_fastest_library_for_the_processor_comes_first(
    vendor: str, order: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """PyTorch's library comes last, and only where PyTorch is installed."""
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(blas, "CPUINFO", tmp_path / "cpuinfo")
    names = [name for name, _ in blas._candidates()]
    assert list(dict.fromkeys(names)) == order + ["PyTorch's"] * bool(importlib.util.find_spec("torch"))


def test_without_proc_cpuinfo_mkl_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "CPUINFO", Path("/no/such/file"))
    assert next(blas._candidates())[0] == "MKL"


def test_the_wheels_of_mkl_and_pytorch_are_found(installed: dict[str, str]) -> None:
    """Libraries from wheels are found by their full path."""
    wheels = {"MKL": "mkl", "PyTorch's": "torch"}
    present = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    for name in (name for name, wheel in wheels.items() if wheel in present):
        assert Path(installed[name]).is_absolute()


def test_auto_loads_the_first_installed_library(installed: dict[str, str]) -> None:
    """Missing libraries are skipped."""
    first = next((installed[name] for name, _ in blas._candidates() if name in installed), None)
    assert run_python(MULTIPLY.replace("TORCH", "False"), MLX_IMPL_BLAS="auto")["path"] == first


def test_the_product_is_right_with_each_library(path: str) -> None:
    """Every entry of a float32 product is within k u |A||B| of NumPy's in float64."""
    found = run_python(MULTIPLY.replace("TORCH", "False"), MLX_IMPL_BLAS=path)
    assert found["path"] == path and found["same"]
    assert found["errors"]["mlx"] <= BOUND


def test_mkl_keeps_32_bit_integers_whatever_its_environment_says(
    installed: dict[str, str],
) -> None:
    """`libmkl_rt` has both interfaces, and MKL_INTERFACE_LAYER must not pick the wrong one."""
    if "MKL" not in installed:
        pytest.skip("MKL BLAS is not installed here")
    found = run_python(
        MULTIPLY.replace("TORCH", "False"),
        MLX_IMPL_BLAS=installed["MKL"],
        MKL_INTERFACE_LAYER="ILP64",
    )
    assert found["path"] == installed["MKL"] and found["errors"]["mlx"] <= BOUND


def test_pytorch_imported_afterwards_is_right_too(path: str) -> None:
    """Two OpenMP runtimes and two MKLs in one process leave both frameworks' products right."""
    pytest.importorskip("torch")
    errors = run_python(MULTIPLY.replace("TORCH", "True"), MLX_IMPL_BLAS=path)["errors"]
    assert set(errors) == {"mlx", "torch", "mlx, after torch"} and max(errors.values()) <= BOUND


def test_importing_the_module_does_not_import_mlx() -> None:
    """Otherwise it would always come too late."""
    code = "import json, sys, mlx_impl.machine.blas; print(json.dumps('mlx.core' in sys.modules))"
    assert run_python(code) is False


# The tests below load nothing: `loads` records the paths that would have been loaded.


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A Linux where MLX is not imported yet and two libraries, "first" and "second", load."""
    paths: list[str] = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    monkeypatch.delenv(blas.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(blas, "_loaded", None)
    monkeypatch.setattr(blas, "_load_globally", paths.append)
    monkeypatch.setattr(blas, "_candidates", lambda: iter([("A", "first"), ("B", "second")]))
    yield paths


def test_a_second_load_returns_the_first_choice(loads: list[str]) -> None:
    """The second call returns the first choice, whatever its argument."""
    choice = blas.load_optimized_blas()
    assert blas.load_optimized_blas("second") is choice is blas.load_optimized_blas("off")
    assert loads == ["first"]


def test_auto_skips_an_unusable_library(loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken MKL does not hide a sound OpenBLAS."""

    def load(path: str) -> None:
        if path == "first":
            raise OSError("broken")

    monkeypatch.setattr(blas, "_load_globally", load)
    assert blas.load_optimized_blas().path == "second"


def test_the_sentence_names_the_library(loads: list[str]) -> None:
    """One line with the name and the file."""
    assert blas.load_optimized_blas().sentence == "BLAS for MLX's CPU matmuls: A (first)."


def test_off_loads_nothing(loads: list[str]) -> None:
    """By argument."""
    choice = blas.load_optimized_blas("off")
    assert (choice.name, choice.path, loads) == (None, None, [])
    assert "turned off" in choice.sentence


def test_the_environment_variable_turns_it_off(loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By MLX_IMPL_BLAS, where there is no argument."""
    monkeypatch.setenv("MLX_IMPL_BLAS", "off")
    assert "turned off" in blas.load_optimized_blas().sentence and loads == []


def test_the_argument_wins_over_the_environment(loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the argument is "auto"."""
    monkeypatch.setenv("MLX_IMPL_BLAS", "off")
    assert blas.load_optimized_blas("auto").path == "first"


def test_it_warns_when_mlx_was_imported_first(loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning says that it is too late, and nothing is loaded."""
    monkeypatch.setitem(sys.modules, "mlx.core", ModuleType("mlx.core"))
    with pytest.warns(RuntimeWarning, match="MLX was imported before"):
        choice = blas.load_optimized_blas()
    assert "MLX was imported before" in choice.sentence and loads == []


@pytest.mark.filterwarnings("error")
def test_off_does_not_warn_when_mlx_was_imported_first(
    loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning would be pointless: nothing was to be loaded."""
    monkeypatch.setitem(sys.modules, "mlx.core", ModuleType("mlx.core"))
    assert "turned off" in blas.load_optimized_blas("off").sentence


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_on_other_systems_than_linux_nothing_is_loaded(
    system: str, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX uses Accelerate on macOS: no load, no warning, no advice."""
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setitem(sys.modules, "mlx.core", ModuleType("mlx.core"))
    assert f"nothing to load on {system}" in blas.load_optimized_blas("some/path").sentence
    assert loads == []


@pytest.mark.parametrize(("machine", "has_mkl"), [("x86_64", True), ("aarch64", False)])
def test_where_none_is_found_the_sentence_says_what_to_install(
    machine: str, has_mkl: bool, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MKL is suggested only where it exists."""
    monkeypatch.setattr(blas, "_candidates", lambda: iter(()))
    monkeypatch.setattr(platform, "machine", lambda: machine)
    sentence = blas.load_optimized_blas().sentence
    assert "25-50 times slower" in sentence and "apt install libopenblas0" in sentence
    assert ("pip install mkl" in sentence) is has_mkl and "\n" not in sentence


def numpy_s_openblas() -> list[str]:
    """NumPy's wheel carries an OpenBLAS with prefixed names and 64-bit integers."""
    folder = Path(numpy.__file__).parents[1] / "numpy.libs"
    return [str(file) for file in folder.glob("libscipy_openblas64*")]


@pytest.mark.skipif(sys.platform != "linux", reason="dlopen of Linux libraries")
@pytest.mark.parametrize("unusable", ["/no/such/libblas.so", "libm.so.6", *numpy_s_openblas()])
def test_an_unusable_path_is_one_sentence(unusable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing file, a library without BLAS, a BLAS with prefixed names."""
    monkeypatch.setattr(blas, "_loaded", None)
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    with pytest.raises(ValueError, match="must be 'auto', 'off' or a loadable") as caught:
        blas.load_optimized_blas(unusable)
    assert repr(unusable) in str(caught.value) and "\n" not in str(caught.value)


def fortran_scopy(integer: type[Any]) -> Callable[..., None]:
    """`scopy_` of a BLAS whose integers are `integer`, for strides of one."""

    def scopy(n: int, x: int, x_stride: int, y: int, y_stride: int) -> None:
        count = integer.from_address(n).value
        ctypes.memmove(y, x, max(count, 0) * ctypes.sizeof(ctypes.c_float))

    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 5)(scopy)


@pytest.mark.parametrize(("integer", "usable"), [(ctypes.c_int32, True), (ctypes.c_int64, False)])
def test_a_blas_with_64_bit_integers_is_refused(
    integer: type[Any], usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX passes 32-bit integers; nothing else may enter the global scope."""
    opened: list[int] = []

    def open_library(path: str, mode: int = ctypes.DEFAULT_MODE) -> SimpleNamespace:
        opened.append(mode)
        return SimpleNamespace(sgemm_=None, scopy_=fortran_scopy(integer))

    monkeypatch.setattr(ctypes, "CDLL", open_library)
    if usable:
        blas._load_globally("it")
    else:
        with pytest.raises(OSError, match="64 bits"):
            blas._load_globally("it")
    assert (ctypes.RTLD_GLOBAL in opened) is usable


SPIN = """
import ctypes, hashlib, json, os
from mlx_impl.machine.blas import load_optimized_blas
choice = load_optimized_blas()
import mlx.core as mx
products = []
for shape in ((7, 576, 4915), (300, 64, 300)):
    mx.random.seed(0)
    product = mx.random.normal(shape[:2]) @ mx.random.normal(shape[1:])
    products.append(hashlib.sha256(bytes(memoryview(product))).hexdigest())
print(json.dumps([os.environ.get("KMP_BLOCKTIME"), products, choice.name]))
"""


def test_a_rank_s_blas_threads_sleep_when_they_wait_and_its_bits_are_those_of_one_process() -> None:
    """Ranks share a machine: threads that spin take the cores of the others. A given value stays."""
    as_given = dict.fromkeys(("KMP_BLOCKTIME", "OMP_WAIT_POLICY", "MLX_RANK"), "")
    alone, rank, told = (
        run_python(SPIN, **{**as_given, **more})
        for more in ({}, {"MLX_RANK": "1"}, {"MLX_RANK": "1", "KMP_BLOCKTIME": "7"})
    )
    assert [found[0] for found in (alone, rank, told)] == ["", "0", "7"]
    assert alone[1:] == rank[1:] == told[1:]
