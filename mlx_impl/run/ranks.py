"""Data parallel: the micro-batches of an update are shared out over the ranks, and their sums added in order.

A rank is one process with a copy of the model. In a round each rank computes one micro-batch; then all ranks
gather the sums of all, and add them in the order of the window. So N ranks add the same numbers in the same
order as one rank does, and get the same bits; `mx.distributed.all_sum` adds in an order of its own.

Source: MLX documentation, "Distributed Communication".
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ..data import Batch
from ..machine.launcher import launched_rank
from ..model import CausalLM
from ..train import Loss, Sums, add_up
from .watchdog import RankLost, Watchdog, without_python

SLICE = 2**20  # elements of each rank that are gathered at once, 4 MiB: memory does not grow with the ranks
TIMEOUT = 600.0  # seconds
JOIN_TIMEOUT = 60.0  # seconds that a rank waits for the others to start; MLX's ring itself gives up after 31

Item = TypeVar("Item")
Vectors = dict[mx.Dtype, mx.array]  # the arrays of a tree, one after the other; those of each type for itself


class Ranks:
    """The processes that train together; `join_ranks` makes it, from the group of `mx.distributed.init`.

    A rank that waits longer than `timeout` seconds for the others ends its process: see watchdog.py.
    `in_order=False` adds by one `mx.distributed.all_sum`, in an order that depends on the number of ranks:
    less to send, and with M micro-batches gradients g_m another result by up to 2 (M - 1) eps sum |g_m|.
    """

    def __init__(self, group: Any, timeout: float = TIMEOUT, in_order: bool = True) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.in_order = in_order
        self.watchdog = Watchdog(f"rank {self.rank}", timeout)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what watches over the waits, for a program that goes on without the others.

        Raises RuntimeError in another thread than the main one, where that has joined the ranks.
        """
        self.watchdog.close()

    def gather(self, own: mx.array) -> mx.array:
        """The arrays of all ranks, one row a rank. All must call it, with arrays of one shape and type."""
        mx.eval(own)
        return self.wait_for(mx.distributed.all_gather(own[None], group=self.group))

    def wait_for(self, result: mx.array) -> mx.array:
        """The result of a collective, evaluated; RankLost when another rank has ended.

        One at a time, because several collectives in one evaluation hang when a peer dies.
        """
        try:
            with self.watchdog.waiting():
                mx.eval(result)
        except RuntimeError as error:
            raise RankLost(f"another rank has ended ({error})") from None
        return result

    def gather_objects(self, own: Any) -> list[Any]:
        """What every rank gives, by rank; of types that JSON knows."""
        text = json.dumps(own).encode()
        lengths: list[int] = self.gather(mx.array(len(text))).tolist()
        padded = mx.array(np.frombuffer(text.ljust(max(lengths)), dtype=np.uint8))
        pieces = [self.gather(padded[start : start + SLICE]) for start in range(0, padded.size, SLICE)]
        rows = np.array(mx.concatenate(pieces, axis=1))
        return [json.loads(bytes(row)) for row in rows]

    def largest(self, number: int) -> int:
        """The largest number that any rank gives: all ranks then do the same."""
        return int(self.gather(mx.array(number)).max().item())

    def require_same(self, facts: dict[str, Any]) -> None:
        """ValueError, with its name, for a fact that is another one on another rank."""
        first, *others = self.gather_objects({"the order of sums": self.in_order, **facts})
        for rank, theirs in enumerate(others, 1):
            different = [name for name in first | theirs if first.get(name) != theirs.get(name)]
            if different:
                raise ValueError(
                    f"all ranks must train alike, and on rank {rank} {different[0]} is not rank 0's"
                )

    def reduce(self, parts: Iterable[Callable[[], Sums]]) -> Sums:
        """The sums over an update's micro-batches; in order they are `train.add_up`'s, to the bit."""
        if not self.in_order:
            return self.reduce_in_any_order(list(parts))
        total = None
        for members in self.rounds(parts):
            own = self.own(members)()
            total = self.add_in_order(total, as_vectors(own), len(members))
        assert total is not None, "an update needs a micro-batch"
        return as_tree(total, like=own)

    def reduce_in_any_order(self, parts: list[Callable[[], Sums]]) -> Sums:
        """Each rank adds up its own micro-batches; then one message for each type of numbers."""
        own = parts[self.rank :: self.size]
        sums = add_up(own or parts[-1:])
        vectors = as_vectors(sums)
        if not own:  # it did the last one again, for the shapes
            vectors = {kind: mx.zeros_like(vector) for kind, vector in vectors.items()}
        mx.eval(vectors)
        added = {
            kind: self.wait_for(mx.distributed.all_sum(vector, group=self.group))
            for kind, vector in vectors.items()
        }
        return as_tree(added, like=sums)

    def rounds(self, items: Iterable[Item]) -> Iterator[list[Item]]:
        """One of the items for each rank, then the next ones; the last round may have fewer."""
        waiting = iter(items)
        while members := list(islice(waiting, self.size)):
            yield members

    def own(self, members: list[Item]) -> Item:
        """This rank's part of a round. Without one it does the last again, which nobody adds."""
        return members[min(self.rank, len(members) - 1)]

    def add_in_order(self, total: Vectors | None, own: Vectors, count: int) -> Vectors:
        """The total and the vectors of the first `count` ranks, added in the order of the ranks."""
        mx.eval(own)
        return {
            kind: mx.concatenate(
                [
                    self.add_slice(None if total is None else total[kind], vector, start, count)
                    for start in range(0, vector.size, SLICE)
                ]
            )
            for kind, vector in own.items()
        }

    def add_slice(self, total: mx.array | None, own: mx.array, start: int, count: int) -> mx.array:
        here = slice(start, start + SLICE)
        first, *others = self.gather(own[here])[:count]
        added = first if total is None else total[here] + first
        for other in others:
            added = added + other
        mx.eval(added)
        return added

    def losses(self, model: CausalLM, batches: Iterable[Batch], loss: Loss) -> Iterator[Any]:
        """The nats and the targets of every batch in its order, for `train.evaluate` with `GIVEN`."""
        for members in self.rounds(batches):
            nats, num_targets = loss.batch_loss(model, loss.to_arrays(self.own(members)))
            rows = self.gather(nats), self.gather(num_targets)
            yield from list(zip(*rows, strict=True))[: len(members)]


def join_ranks(timeout: float = TIMEOUT, in_order: bool = True) -> Ranks:
    """The ranks that a launcher has started; each waits here for the others, at most JOIN_TIMEOUT seconds.

    Raises ValueError without a launcher, where `mx.distributed.init()` would silently be one rank.
    """
    if launched_rank() is None:
        raise ValueError(
            "several ranks need a launcher, such as: mlx.launch -n 2 --backend ring -- python PROGRAM"
        )
    start = time.monotonic()
    try:
        with without_python(JOIN_TIMEOUT):
            group = mx.distributed.init(strict=True)
    except RuntimeError as error:
        seconds = time.monotonic() - start
        raise RankLost(f"the ranks have not come together within {seconds:.0f} s ({error})") from None
    return Ranks(group, timeout, in_order)


# A "batch" of `Ranks.losses` is its nats and the number of its targets.
GIVEN = Loss(to_arrays=list, batch_loss=lambda _, nats: (nats[0], nats[1]), flatten_grads=lambda tree: tree)


def as_vectors(tree: Any) -> Vectors:
    leaves: dict[mx.Dtype, list[mx.array]] = {}
    for _, leaf in tree_flatten(tree):
        leaves.setdefault(leaf.dtype, []).append(leaf.flatten())
    return {kind: mx.concatenate(arrays) for kind, arrays in leaves.items()}


def as_tree(vectors: Vectors, like: Any) -> Any:
    """The inverse of `as_vectors`, with the names and the shapes of this tree."""
    places = dict.fromkeys(vectors, 0)

    def piece(leaf: mx.array) -> mx.array:
        start = places[leaf.dtype]
        places[leaf.dtype] += leaf.size
        return vectors[leaf.dtype][start : start + leaf.size].reshape(leaf.shape)

    return tree_map(piece, like)
