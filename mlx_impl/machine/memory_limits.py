"""How much memory MLX may come to hold: the least of all limits, each with its name.

A hard limit ends the process, by a signal or an error inside MLX. What is free now may become more, when
others end or the system swaps, so it is worth a warning. Each is that of all of MLX's arrays: what is left,
and what they hold already.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import psutil

from .address_space import address_space_limit, program_bytes

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Address space that is mapped and not used: pools of the C library, and their gaps. Chosen, not derived: with
# it no limit that the check lets pass was seen to end in a signal.
MAPPED = 128 * 2**20


class TooLittle(ValueError):
    """Memory; the message is one sentence."""


class Limit(NamedTuple):
    what: str
    num_bytes: int
    is_hard: bool


def limits() -> list[Limit]:
    """All that there are, the smallest first."""
    held = int(mx.get_active_memory())
    found = [Limit(what, held + left, True) for what, left in left_of_limits()] if uses_host() else []
    found += device_limits(mx.device_info() if mx.default_device() == mx.gpu else {})
    if uses_host():
        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        found.append(Limit("free memory", held + memory.available, False))
        found.append(Limit("memory and swap", memory.total + swap.total, True))
    return sorted(found, key=lambda limit: limit.num_bytes)


def uses_host() -> bool:
    """Whether arrays are in the memory of the processor, as on a CPU and on Apple's chips."""
    return bool(mx.default_device() != mx.gpu or mx.metal.is_available())


def left_of_limits() -> Iterator[tuple[str, int]]:
    held = int(mx.get_active_memory())
    if (limit := address_space_limit()) is not None:
        mapped = psutil.Process().memory_info().vms
        yield "RLIMIT_AS", left_of_address_space(limit, mapped, held, program_bytes())
    for left in left_of_control_groups(CGROUPS, OWN_CGROUPS):
        yield "the control group's limit", left


def left_of_address_space(limit: int, mapped: int, held: int, program: int) -> int:
    """Beside the arrays: what is mapped now, or what the whole program comes to map if that is more."""
    return limit - held - max(mapped - held, program) - MAPPED


def left_of_control_groups(root: Path, own: Path) -> Iterator[int]:
    """Of this process's groups and all above them; pages of files that nobody uses do not count."""
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
            if group.is_relative_to(top) and (left := left_of_group(group, *names)) is not None:
                yield left


def left_of_group(group: Path, limit: str, current: str, reclaimable: str) -> int | None:
    """None where it has no limit, or says nothing."""
    try:
        most, used = (int((group / file).read_text()) for file in (limit, current))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return most - used + int(statistics.get(reclaimable, 0))
    except (OSError, ValueError):  # no such file; "max"
        return None


def device_limits(info: dict[str, object]) -> list[Limit]:
    """Of what MLX says about a GPU: Metal's limit, or all the memory that the card has."""
    for key, what in (
        ("max_recommended_working_set_size", "Metal's working set"),
        ("total_memory", "the GPU's memory"),
    ):
        if isinstance(size := info.get(key), int) and size > 0:
            return [Limit(what, size, True)]
    return []


def shown(num_bytes: float) -> str:
    """12.3 GiB."""
    if num_bytes < 2**30:
        return f"{max(0, num_bytes) / 2**20:.0f} MiB"
    return f"{num_bytes / 2**30:.1f} GiB"


def refusal(what: str, need: int, limit: Limit) -> str:
    return (
        f"{what} needs about {shown(need)} and this process may have {shown(limit.num_bytes)} ({limit.what})"
    )


def require_bytes(what: str, more: int) -> None:
    """TooLittle where a hard limit leaves no room for so many bytes beside what MLX holds."""
    need = int(mx.get_active_memory()) + more
    for limit in limits():
        if limit.is_hard and need > limit.num_bytes:
            raise TooLittle(refusal(what, need, limit))
