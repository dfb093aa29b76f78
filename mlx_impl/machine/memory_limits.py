"""How much memory MLX's arrays may take: all limits that apply, each with its name.

Exceeding a hard limit ends the process with a signal or an error inside MLX. The memory that is free now is
a soft limit, worth only a warning: it grows when other processes end or the system swaps. Every limit is for
all arrays together: the memory they take now plus what is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import psutil

from .address_space import address_space_limit, program_bytes

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Address space that is mapped but unused: malloc arenas and gaps between them. The value is empirical: with
# it, no run that passed the check was seen to end with a signal.
UNUSED_BYTES = 128 * 2**20
WITH_SWAP = "memory and swap"


class TooLittleMemory(ValueError):
    """A hard limit would be exceeded."""


class Limit(NamedTuple):
    name: str
    num_bytes: int
    is_hard: bool


def memory_limits() -> list[Limit]:
    """All limits that apply, smallest first."""
    active = int(mx.get_active_memory())
    found = [Limit(name, active + left, True) for name, left in remaining_by_limit()] if uses_host() else []
    found += device_limits(mx.device_info() if mx.default_device() == mx.gpu else {})
    if uses_host():
        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        found.append(Limit("free memory", active + memory.available, False))
        found.append(Limit(WITH_SWAP, memory.total + swap.total, True))
    return sorted(found, key=lambda limit: limit.num_bytes)


def whole_memory() -> Limit:
    """What a run may take at most where nothing else runs: the smallest hard limit, without swap."""
    found = [limit for limit in memory_limits() if limit.is_hard and limit.name != WITH_SWAP]
    if uses_host():
        program = psutil.Process().memory_info().rss - int(mx.get_active_memory())
        found.append(Limit("this machine's memory", psutil.virtual_memory().total - program, True))
    return min(found, key=lambda limit: limit.num_bytes)


def uses_host() -> bool:
    """Whether arrays are in host memory, as on a CPU and on Apple's chips."""
    return bool(mx.default_device() != mx.gpu or mx.metal.is_available())


def remaining_by_limit() -> Iterator[tuple[str, int]]:
    """(name, bytes left) of each limit that the system sets for this process."""
    active = int(mx.get_active_memory())
    if (limit := address_space_limit()) is not None:
        mapped = psutil.Process().memory_info().vms
        yield "RLIMIT_AS", remaining_address_space(limit, mapped, active, program_bytes())
    for left in remaining_in_control_groups(CGROUPS, OWN_CGROUPS):
        yield "the control group's limit", left


def remaining_address_space(limit: int, mapped: int, active: int, program: int) -> int:
    """The limit minus the active arrays and the program, as mapped now or at its peak, whichever is more."""
    return limit - active - max(mapped - active, program) - UNUSED_BYTES


def remaining_in_control_groups(root: Path, own: Path) -> Iterator[int]:
    """Bytes left in this process's control groups and their parents; inactive file cache counts as free."""
    if not own.is_file():
        return
    for line in own.read_text(encoding="utf-8").splitlines():
        number, controllers, name = line.split(":", 2)
        if number == "0":
            files = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            files = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        top, *names = files
        path = top / name.strip("/")
        for group in (path, *path.parents):
            if group.is_relative_to(top) and (left := remaining_in_group(group, *names)) is not None:
                yield left


def remaining_in_group(group: Path, limit: str, current: str, reclaimable: str) -> int | None:
    """None for a group without a limit or without these files."""
    try:
        most, used = (int((group / file).read_text()) for file in (limit, current))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return most - used + int(statistics.get(reclaimable, 0))
    except (OSError, ValueError):  # no such file; "max"
        return None


def device_limits(info: Mapping[str, object]) -> list[Limit]:
    """The limit in MLX's description of a GPU: Metal's working set, or the GPU's whole memory."""
    for key, name in (
        ("max_recommended_working_set_size", "Metal's working set"),
        ("total_memory", "the GPU's memory"),
    ):
        if isinstance(size := info.get(key), int) and size > 0:
            return [Limit(name, size, True)]
    return []


def format_bytes(num_bytes: float) -> str:
    """For example "12.3 GiB" or "300 MiB"."""
    if num_bytes < 2**30:
        return f"{max(0, num_bytes) / 2**20:.0f} MiB"
    return f"{num_bytes / 2**30:.1f} GiB"


def shortage(what: str, need: int, limit: Limit) -> str:
    """The error message for a hard limit that would be exceeded."""
    available = format_bytes(limit.num_bytes)
    return f"{what} needs about {format_bytes(need)} but this process may use {available} ({limit.name})"


def require_bytes(what: str, more: int) -> None:
    """TooLittleMemory where a hard limit leaves no room for `more` bytes beside the active arrays."""
    need = int(mx.get_active_memory()) + more
    for limit in memory_limits():
        if limit.is_hard and need > limit.num_bytes:
            raise TooLittleMemory(shortage(what, need, limit))
