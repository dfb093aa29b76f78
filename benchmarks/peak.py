"""Peak memory of a step as the allocator counts it. Each trainer is measured in its own process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Peak:
    peak_bytes: int  # the highest during the steps
    active_bytes: int  # held between steps
    cache_bytes: int  # freed buffers that the allocator keeps; 0 where it does not report them


def measured_peak(step: Callable[[], object], whose: str, num_steps: int) -> Peak:
    """The peak over `num_steps` steps; `whose` allocator to ask: "mlx" or "torch"."""
    return {"mlx": peak_of_mlx, "torch": peak_of_torch}[whose](step, num_steps)


def peak_of_mlx(step: Callable[[], object], num_steps: int) -> Peak:
    import mlx.core as mx

    mx.clear_cache()
    mx.reset_peak_memory()
    for _ in range(num_steps):
        step()
    return Peak(mx.get_peak_memory(), mx.get_active_memory(), mx.get_cache_memory())


def peak_of_torch(step: Callable[[], object], num_steps: int) -> Peak:
    """On a GPU the allocator's peak. On a CPU PyTorch counts no bytes: the process's resident memory."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    for _ in range(num_steps):
        step()
    if torch.cuda.is_available():
        active = torch.cuda.memory_allocated()
        return Peak(torch.cuda.max_memory_allocated(), active, torch.cuda.memory_reserved() - active)
    return Peak(resident_bytes("VmHWM"), resident_bytes("VmRSS"), 0)


def resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])
