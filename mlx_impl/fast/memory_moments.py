"""What is in memory at the moments at which a CPU holds the most, counted in arrays of each size.

MLX's CPU backend allocates up to a hundred dispatches ahead of what it computes, most of a block: so beside
what is kept there are arrays of many operations at once. Which they are follows from the order of the
operations alone. It was read off a log of MLX's allocator, in which axes of different lengths tell arrays
apart by size; of all moments those are listed that hold most for some shape. A count is written behind its
letter, `s3 d2` is 3 B H T S + 2 U D numbers, of B rows, T wide, with U computed positions and N targets:

    s   B H T S, scores       m   T S, a mask      d, f, q, k   U D, U F, U H K, U G K
    r   U R of one linear     v   N V, float32     nd, nf, nq   as d, f and q, of the N targets
    w   the largest weight                         bq, bk       queries and keys of all places in rows
"""

from __future__ import annotations

from typing import NamedTuple


class Moment(NamedTuple):
    """What is held beside what is kept, and what these add: packed weights, DoRA, dropout, 16 bits."""

    base: str
    packed: str = ""
    dora: str = ""
    dropout: str = ""
    half: str = ""
    short: bool = False  # only with few operations a block: neither with DoRA nor with packed weights


EVALUATION = (
    Moment(  # the softmax
        "s3 m1.25 d2 bq6 bk5 q2 k1 r1",
        packed="w2 m-1",
        dora="w1",
        half="s5 m0.25 d-1",
    ),
    Moment("s3 m1 d4 f2 bq2 bk2 q1 k1 r3", half="s5 d5 f-2", short=True),
    Moment("s1 m1 d4 f4 bq2 bk2 q1 r3", half="d5 f2", short=True),
    Moment(  # the gate
        "d5 f4 q1 k2 r4",
        packed="d-1 w3 q-1 k-2",
        dora="d-2 f2 w2 q-1 k-2",
        half="d4 f2",
    ),
)
EVALUATION_HEAD = (Moment("v3 nd5 nf4", packed="w1", dora="w1", half="v0.5 nd5 nf2"),)

STEP = (  # beside what all blocks keep
    Moment(  # the gradient of attention
        "s2 bq6 bk7 q2 k2 nd-1 nf-3 nq1",
        packed="w1",
        dora="nd1 nf2 bq1 bk2",
    ),
    Moment(
        "s2 bq3 bk2 k2 q1 nd5 nf-1 nq1",
        packed="w2 nf-1 nq1 k-2",
        dora="nf2",
        half="s5 d1 nd-2 bk2 bq2",
    ),
    Moment("s1 k1 q2 nd5 nf4 nq1", half="nd6"),
    Moment(  # of the last feed-forward
        "v1 nd7 nf6", packed="w2", dora="nd1 nf2", half="v1 nd9 nf-1"
    ),
)
STEP_HEAD = (
    Moment("v4 nd6 nf1", packed="nd-1", half="v1 nd2 nf-1"),
    Moment("v3 nd6 nf5", dora="nd1", half="nd3"),
)
BEFORE_LAST = (  # beside what all blocks but the last keep: of those targets may be few
    Moment(
        "d9 f5 nd1",
        packed="d-3 f1 w2",
        dora="d-2 f2 k6 q3 nd4 nf4",
        half="d8",
    ),
    Moment("s1 d8 k5 q5", dora="nd4 nf4 d-2 k4 q2"),
)

CHECKPOINTED = (  # beside a hidden state of each block
    Moment(
        "s3 d6 f6 bq2 bk2 q2 k1 r11",
        packed="d2 f-4 q1 w3",
        dora="d3 k5 q3",
        dropout="d10 f-4 q3 k1.5",
        half="s5 d5 f-6 m1",
    ),
    Moment(
        "s1 d8 f9 bq1 bk2 q1 r12",
        packed="d-2 f1 w3",
        dora="d1 f4 k2 q1",
        dropout="d6 f3.25 q1",
        half="d7",
    ),
    Moment(
        "s3 d2 bq7 bk8 q3 k3 r4",
        dora="d2 f4 k4 q1",
        dropout="d5 q1",
        half="s5 d6 bq-3.5 bk-6 m1.5",
    ),
    Moment(
        "s3 d5 bq7 bk7 q2 k1 r5",
        packed="w1",
        dora="f4 k6 q2",
        dropout="d6 q2",
        half="s-1 d10 f7 bq-4.5 bk-5",
    ),
    Moment(
        "s2 d6 f6 bq2 bk2 q2 k1 r11",
        packed="d2 f-4 q1 w3",
        dora="d3 f5 q1 k2",
        dropout="d10 f-4 q3 k1.5",
        half="s5 d5 f-6 m1",
    ),
)
CHECKPOINTED_HEAD = (Moment("v4 nd4 nf4", packed="nd2 nf-4", dropout="nd1", half="v1 nd6 nf-4"),)
