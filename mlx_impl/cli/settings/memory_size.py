"""An amount of memory as a flag has it: a number with a unit, such as 64GB. No MLX import."""

from __future__ import annotations

import re

AMOUNT = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([kmgt])(i?)b?", re.IGNORECASE | re.ASCII)
POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_memory(text: str) -> int:
    """Bytes: 1 GB (or G) is 1000 MB, 1 GiB 1024 MiB. Raises ValueError for anything else."""
    found = AMOUNT.fullmatch(text.strip())
    num_bytes = 0
    if found:
        number, unit, binary = found.groups()
        num_bytes = int(float(number) * (1024 if binary else 1000) ** POWERS[unit.lower()])
    if num_bytes < 1:
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise ValueError(f"--memory must be a positive number with a unit, such as 64GB, got {shown!r}")
    return num_bytes
