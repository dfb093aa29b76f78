"""Where MLX computes in the tests: `--device` and `--blas`, and what the header says of them; and with
pytest-xdist, which tests share a process.

float32 is computed on the default device, as the trainer does. float64 does not exist on a GPU, so whatever
is proven in float64 runs on MLX's CPU device (`MlxTrainer.exact`, `on_the_cpu`).
"""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.nightly import IS_NIGHTLY

# A rung is blocked by a failure below it, and climbs share the reference's results: those of a group run in
# one process.
TOGETHER = {
    "tests/lora_ladder/": "ladder",
    "tests/trainers/test_adapters.py": "ladder",
    "tests/trainers/test_mutants.py": "mutants",
    "tests/units/test_train_on_ranks.py": "ranks",
    "tests/e2e/": "e2e",  # and its runs of the real model: most of a step is on one core
}
BLAS = pytest.StashKey[str]()
HAS_MLX = importlib.util.find_spec("mlx") is not None  # without it, a trainer of another kind is judged


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("MLX")
    group.addoption("--device", choices=("cpu", "gpu"), help="MLX's default device; default: MLX's choice")
    group.addoption(
        "--blas",
        metavar="auto|off|PATH",
        help="of MLX's CPU matmuls; default: off, because one that PyTorch shares would prove nothing",
    )


@pytest.hookimpl(tryfirst=True)  # before a trainer is imported, and MLX with it
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "nightly: only with HYPOTHESIS_PROFILE=nightly (tox -e nightly)")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which nohup and a shell's & leave ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    blas, device = config.getoption("--blas"), config.getoption("--device")
    if blas is not None:
        from mlx_impl import load_optimized_blas

        config.stash[BLAS] = load_optimized_blas(blas).sentence
    if device is not None:
        import mlx.core as mx

        if not mx.is_available(mx.Device(getattr(mx, device))):
            raise pytest.UsageError(f"--device must be one that MLX has here, got {device!r}")
        mx.set_default_device(getattr(mx, device))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """More of the same, which takes minutes, is left to the night."""
    if IS_NIGHTLY:
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("nightly")])
    items[:] = [item for item in items if not item.get_closest_marker("nightly")]


def pytest_report_header(config: pytest.Config) -> list[str]:
    if not HAS_MLX:
        return []
    import mlx.core as mx

    device = "GPU" if mx.default_device() == mx.gpu else "CPU"
    return [f"MLX: float32 on the {device}, float64 on the CPU. {config.stash.get(BLAS, '')}"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each test goes to the process that is free, but those that build on one another to one, in order."""
    if config.option.dist != "load":
        return None
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((group for path, group in TOGETHER.items() if nodeid.startswith(path)), nodeid)

    return Together(config, log)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The cases are so small that PyTorch's threads would only wait for one another."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def on_the_cpu() -> Iterator[None]:
    """Where MLX knows float64, and where bytes are counted."""
    import mlx.core as mx

    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)
