"""What each rank of `test_ranks.py` runs to add up numbers in any order: prints the sums as JSON."""

from __future__ import annotations

import json
import sys
from functools import partial

import mlx.core as mx

from mlx_impl.run.ranks import join_ranks
from mlx_impl.train import Sums


def sums_of(number: int) -> Sums:
    """One micro-batch's sums: as many targets as its number, and gradients of unlike sizes."""
    mx.random.seed(number)
    gradients = {"a": mx.random.normal((3, 5)) * 10.0**number, "b": [mx.random.normal((7,))]}
    return (mx.array(1.5 * number), mx.array(number)), gradients


if __name__ == "__main__":
    ranks = join_ranks(in_order=False)
    (nats, count), gradients = ranks.reduce(partial(sums_of, n) for n in range(1, int(sys.argv[1]) + 1))
    print(json.dumps([nats.item(), count.item(), gradients["a"].tolist(), gradients["b"][0].tolist()]))
