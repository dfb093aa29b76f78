"""Mutations: damage to the bytes of a file, to the values of its JSON, to the header of a safetensors file.

A mutation depends only on the content and a random number generator, so a case number replays it.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]


def nested(depth: int, kind: str = "list") -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


# Values of every type and size, and texts with terminal control codes.
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        255,
        65_537,
        2**31 - 1,
        2**31,
        2**40,
        2**63,
        2**64,
        10**30,
        -(2**63),
    ),
    *(0.0, -0.0, 0.5, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"), 4.0, 1e30),
    *(
        "",
        " ",
        "0",
        "llama",
        "x\ny",
        "\x1b[31mred\x07",
        "\u202eevil",
        "\ud800",
        "a\0b",
        "../../etc/passwd",
        "ä" * 40,
    ),
    *(
        [],
        {},
        [[]],
        [None],
        ["a", 1],
        {"a": None},
        {"": ""},
        [1, 2, 3],
        nested(30),
        nested(300),
        nested(40, "dict"),
    ),
    *("{{ 1/0 }}", "{% for x in range(9**9) %}x{% endfor %}", "{{ 'a' * 9**9 }}", "(((", "[a-z", "(a+)+$"),
)


def flip_bit(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def flip_early_bit(data: bytes, rng: random.Random) -> bytes:
    """In the first 200 bytes, where headers are."""
    return flip_bit(data[:200], rng) + data[200:]


def flip_many(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randrange(2, 40)):
        data = flip_bit(data, rng)
    return data


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def span(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.choice((1, 2, 4, 8, 64, 1000)))


def delete(data: bytes, rng: random.Random) -> bytes:
    start, end = span(data, rng)
    return data[:start] + data[end:]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 2, 8, 100))) + data[at:]


def repeat(data: bytes, rng: random.Random) -> bytes:
    start, end = span(data, rng)
    return data[:end] + data[start:]


def overwrite(data: bytes, rng: random.Random) -> bytes:
    start, end = span(data, rng)
    return (
        data[:start]
        + rng.choice((b"\x00", b"\xff", b"\x7f", b" ", b"9", b'"', b"[")) * (end - start)
        + data[end:]
    )


def append(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice((b"\x00", b"{}", b"\n", b"garbage", b"\xff\xfe", b"\xef\xbb\xbf"))


def replace_whole(data: bytes, rng: random.Random) -> bytes:
    deep = b"[" * 100_000
    return rng.choice(
        (b"", b"\x00", b"null", b"[]", b"{}", b"3", b'"a"', b"\xff" * 9, deep, b'{"a":' * 50_000, b"NaN")
    )


BYTES: tuple[Mutation, ...] = (
    *(
        flip_bit,
        flip_early_bit,
        flip_many,
        truncate,
        delete,
        insert,
        repeat,
        overwrite,
        append,
        replace_whole,
    ),
)


def entries(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree of JSON values."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            found += [(value, key), *entries(value[key])]
    return found


def mutate_tree(tree: Any, rng: random.Random) -> Any:
    """Replace, remove, rename, swap or wrap one value or a few."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        # Often only top-level keys, which long lists such as a vocabulary would outnumber.
        found = entries(tree) if rng.random() < 0.4 else [(tree, key) for key in keys_of(tree)]
        if not found:
            return rng.choice(VALUES)
        container, key = rng.choice(found)
        act = rng.randrange(8)
        if act <= 3:
            container[key] = rng.choice(VALUES)
        elif act == 4:
            del container[key]
        elif act == 5 and isinstance(container, dict):
            container[f"{key}{rng.choice(('_', ' ', '.weight', chr(10), chr(27)))}"] = container.pop(key)
        elif act == 6:
            other, other_key = rng.choice(found)
            container[key], other[other_key] = other[other_key], container[key]
        else:
            container[key] = rng.choice(([container[key]], {"a": container[key]}, str(container[key])))
    return tree


def keys_of(tree: Any) -> list[Any]:
    return list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    try:
        return json.dumps(mutate_tree(json.loads(data), rng)).encode()
    except (ValueError, RecursionError):  # a value that contains itself
        return flip_bit(data, rng)


def mutate_line(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = mutate_json(lines[at], rng)
    return b"\n".join(lines) + b"\n"


def split_safetensors(data: bytes) -> tuple[bytes, bytes]:
    (length,) = struct.unpack_from("<Q", data)
    return data[8 : 8 + length], data[8 + length :]


def mutate_length(data: bytes, rng: random.Random) -> bytes:
    """Change the header's length, which a reader might trust and allocate."""
    header, _ = split_safetensors(data)
    near = len(header) + rng.choice((-8, -1, 1, 8))
    length = rng.choice((0, 1, 2, near, len(data), 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + data[8:]


def with_header(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    header, body = split_safetensors(data)
    return with_header(mutate_json(header, rng), body)


def mutate_entry(data: bytes, rng: random.Random) -> bytes:
    """Change one tensor's dtype, shape or offsets."""
    text, body = split_safetensors(data)
    header = json.loads(text)
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry, other = header[name], header[rng.choice([n for n in header if n != "__metadata__"])]
    begin, end = entry["data_offsets"]
    changes: tuple[tuple[str, Any], ...] = (
        ("dtype", rng.choice(("F64", "F16", "BF16", "I64", "U32", "BOOL", "F8_E4M3", "C64", "X9", "", 5))),
        (
            "shape",
            rng.choice(([], [0], [-1], [2**31, 2], [2**32, 2**32], [2**63], [1] * 40, entry["shape"][::-1])),
        ),
        ("shape", [*entry["shape"], rng.choice((0, 1, 2, 2**40, 1.5, "1", None))]),
        (
            "data_offsets",
            rng.choice(([end, begin], [begin, begin], [-8, 0], [0, 2**63], [2**62, 2**62 + end - begin])),
        ),
        (
            "data_offsets",
            [begin + rng.choice((1, -1, 4, len(body))), end + rng.choice((1, -1, 4, len(body)))],
        ),
        (
            "data_offsets",
            rng.choice((other["data_offsets"], [begin], [begin, end, end], [1e300, 2e300], "0")),
        ),
    )
    key, value = rng.choice(changes)
    entry[key] = value
    return with_header(header, body)


def rename_tensor(data: bytes, rng: random.Random) -> bytes:
    text, body = split_safetensors(data)
    header = json.loads(text)
    name = rng.choice([name for name in header if name != "__metadata__"])
    new = rng.choice(
        ("", "x", "lm_head.weight", "\x1b[2J", "a\nb", "\u202e", f"{name}.scales", "é" * 300, ".")
    )
    return with_header({(new if n == name else n): entry for n, entry in header.items()}, body)


def make_not_finite(data: bytes, rng: random.Random) -> bytes:
    """Set one weight to NaN or infinity."""
    _, body = split_safetensors(data)
    at = len(data) - len(body) + 4 * rng.randrange(len(body) // 4)
    return (
        data[:at]
        + struct.pack("<f", rng.choice((float("nan"), float("inf"), -float("inf"))))
        + data[at + 4 :]
    )


def mutate_progress(data: bytes, rng: random.Random) -> bytes:
    """Change the JSON in the metadata of a training state."""
    text, body = split_safetensors(data)
    header = json.loads(text)
    metadata = header["__metadata__"]
    metadata["progress"] = mutate_json(metadata["progress"].encode(), rng).decode("utf-8", "replace")
    return with_header(header, body)


SAFETENSORS = (
    *BYTES,
    *(mutate_length, mutate_header, mutate_entry, mutate_entry, rename_tensor, make_not_finite),
)
JSON: tuple[Mutation, ...] = (*BYTES, *(mutate_json,) * 14)
LINES: tuple[Mutation, ...] = (*BYTES, *(mutate_line,) * 10)
