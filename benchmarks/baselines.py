"""Earlier times of this machine: a second gate, which only warns.

One file per CPU, in a folder that git ignores, because seconds of one machine say nothing about another. A
new benchmark is added to the file; known times stay until a run is asked to replace them.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from mlx_impl.disk.files import atomic_write, read_json_object

from .gate import SLACK

FOLDER = Path(__file__).resolve().parents[1] / ".benchmarks"


def cpu_name() -> str:
    """The CPU's name as the system reports it."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def fingerprint() -> str:
    """A folder name for this CPU, number of cores and operating system."""
    words = f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()}"
    readable = "-".join("".join(c if c.isalnum() else " " for c in words).split())
    return f"{readable[:60]}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"


@dataclass
class Baselines:
    """Median seconds by name of the benchmark."""

    path: Path
    replaced: bool = False  # let this run's seconds replace the known ones
    seconds: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        """ValueError if the file was not written by `write`; such a file is never overwritten."""
        self.seconds = read_json_object(self.path) if os.path.lexists(self.path) else {}
        if not all(type(seconds) in (int, float) for seconds in self.seconds.values()):
            raise ValueError(f"{self.path}: must be seconds by names of benchmarks: move it away")

    def compare(self, name: str, seconds: float) -> str | None:
        """A warning if the benchmark is slower than before by more than SLACK, else None."""
        known = self.seconds.get(name)
        if known is None or self.replaced:
            self.seconds[name] = seconds
            return None
        if seconds <= known * SLACK:
            return None
        return f"{name}: {seconds:.4g} s, {seconds / known:.2f} times the {known:.4g} s that it took before"

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as part:
            part.write_text(json.dumps(self.seconds, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def baselines_here(replaced: bool) -> Baselines:
    return Baselines(FOLDER / fingerprint() / "baseline.json", replaced)
