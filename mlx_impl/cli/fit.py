"""`inspect --fit`: the longest row and the largest batch that fit into memory, without reading a weight."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from .settings.flags import add_switch, require_at_least
from .settings.memory_size import parse_memory

if TYPE_CHECKING:
    from ..run.fit import Setting


def add_fit_flags(group: Any) -> None:
    add_switch(
        group,
        "--fit",
        False,
        "instead of the data show which rows and batches fit into memory; reads config.json and no weights, "
        "rows have --max-seq-length tokens (default: no)",
    )
    group.add_argument(
        "--memory",
        metavar="SIZE",
        help="with --fit: how much memory there is, as 64GB (default: this machine's)",
    )


def run(args: argparse.Namespace) -> None:
    from .screen.console import make_console
    from .screen.fit import print_fit

    require_at_least(1, "max_seq_length", args.max_seq_length)
    result = fit_of(args.model, args.memory, args.max_seq_length)
    if args.json:
        print(json.dumps(result))
    else:
        print_fit(result, make_console(stderr=False))


def fit_of(model: str | None, memory: str | None, tokens: int) -> dict[str, Any]:
    """What fits in every setting; the largest batch is of rows of so many tokens."""
    import mlx.core as mx

    from ..config import LoRAConfig
    from ..files.described import read_description
    from ..machine.memory_limits import Limit, whole_memory
    from ..run import fit

    limit = whole_memory() if memory is None else Limit("--memory", parse_memory(memory), True)
    found = read_description(model)
    settings, most = fit.settings_of(found), found.max_tokens or fit.END
    return {
        "model": found.path.name if found.path.suffix == ".gguf" else found.path.resolve().parent.name,
        "num_weights": fit.num_weights(settings),
        "memory_bytes": limit.num_bytes,
        "limit": limit.name,
        "device": "GPU" if mx.default_device() == mx.gpu else "CPU",
        "rank": LoRAConfig().rank,
        "tokens": tokens,
        "max_tokens": found.max_tokens,
        "margin_percent": fit.MARGIN_PERCENT,
        "settings": [table_row(one, limit.num_bytes, tokens, most) for one in settings],
    }


def table_row(one: Setting, limit: int, tokens: int, most: int) -> dict[str, Any]:
    """Of one setting its least need, the longest row and the largest batch."""
    from ..run import fit

    return {
        "bits": one.bits,
        "dtype": one.dtype,
        "grad_checkpoint": one.checkpointed,
        "least_bytes": one.bytes_needed(1, 1),
        "longest_row": fit.longest_row(one, limit, most),
        "largest_batch": fit.largest_batch(one, limit, tokens),
    }
