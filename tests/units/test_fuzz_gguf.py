"""Damaged GGUF files are read right or refused in one sentence, in little time and memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_impl.config import ModelConfig
from mlx_impl.files.checkpoint import load_model, to_numpy
from mlx_impl.files.formats.gguf_file import read_container
from tests.gguf_files import FAMILIES, random_weights, sentencepiece_metadata, write_family

SPECS = {name: replace(FAMILIES[name][1], num_hidden_layers=1) for name in ("llama", "qwen2", "qwen3")}
TOKENIZERS = {"qwen2": sentencepiece_metadata(), "llama": {}, "qwen3": {"tokenizer.ggml.pre": "llama-bpe"}}
HUGE = [2**64 - 1, 2**63, 2**62 + 1, 2**48, 2**40, 2**32, 2**31, 2**31 - 1, 2**24, 0]
MAX_SECONDS = 5.0  # per file: a reader that trusts a damaged length needs hours
MAX_BYTES = 500 * 2**20  # more than before, over all files

Damage = Callable[[bytearray, int, np.random.Generator], None]


def flip_bits_of_the_header(data: bytearray, header: int, rng: np.random.Generator) -> None:
    for _ in range(rng.integers(1, 4)):
        data[rng.integers(header)] ^= 1 << int(rng.integers(8))


def overwrite_bytes_of_the_header(data: bytearray, header: int, rng: np.random.Generator) -> None:
    for _ in range(rng.integers(1, 4)):
        data[rng.integers(header)] = int(rng.integers(256))


def change_a_letter_or_a_number(data: bytearray, header: int, rng: np.random.Generator) -> None:
    """Change a byte that is not zero, so rarely one of a length: the container stays intact."""
    place = int(rng.choice(np.flatnonzero(np.frombuffer(data[:header], np.uint8))))
    data[place] = int(rng.integers(1, 256))


def overwrite_tensors(data: bytearray, header: int, rng: np.random.Generator) -> None:
    """Random bytes, some of them NaN or infinity."""
    for place in rng.integers(header, len(data) - 4, size=100):
        data[place : place + 4] = rng.bytes(4)


def truncate(data: bytearray, header: int, rng: np.random.Generator) -> None:
    del data[rng.integers(header if rng.random() < 0.8 else len(data)) :]


def make_a_number_huge(data: bytearray, header: int, rng: np.random.Generator) -> None:
    """At any place, lengths included; more often in the counts of tensors and keys at the start."""
    place = int(rng.choice([8, 16, *rng.integers(header - 8, size=20)]))
    data[place : place + 8] = int(rng.choice(np.array(HUGE, np.uint64))).to_bytes(8, "little")


def drop_bytes(data: bytearray, header: int, rng: np.random.Generator) -> None:
    place = int(rng.integers(header))
    del data[place : place + int(rng.integers(1, 40))]


def insert_bytes(data: bytearray, header: int, rng: np.random.Generator) -> None:
    place = int(rng.integers(header))
    data[place:place] = rng.bytes(int(rng.integers(1, 40)))


DAMAGES: dict[Damage, int] = {
    flip_bits_of_the_header: 300,
    overwrite_bytes_of_the_header: 200,
    change_a_letter_or_a_number: 600,
    overwrite_tensors: 60,
    truncate: 100,
    make_a_number_huge: 300,
    drop_bytes: 60,
    insert_bytes: 60,
}


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def outcome(path: Path, spec: ModelConfig) -> str:
    """ "read" or "refused"; a model that was read must have the right shapes and finite weights."""
    started = time.perf_counter()
    try:
        weights = to_numpy(load_model(path).model)
    except ValueError as error:
        message = str(error)
        assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 1000, message
        return "refused"
    finally:
        assert time.perf_counter() - started < MAX_SECONDS
    assert {n: w.shape for n, w in weights.items()} == {n: w.shape for n, w in random_weights(spec).items()}
    assert all(np.isfinite(weight).all() for weight in weights.values())
    return "read"


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_read_right_or_refused_in_one_sentence(
    tmp_path: Path, damage: Damage, family: str
) -> None:
    """No other exception, no crash, no hang, and no allocation of a damaged length."""
    path = write_family(tmp_path / "tiny.gguf", family, TOKENIZERS[family], spec=SPECS[family])
    whole, before = path.read_bytes(), peak_bytes()
    header = len(whole) - sum(tensor.data.size for tensor in read_container(path)[1].values())
    seen = []
    for seed in range(DAMAGES[damage] // len(SPECS)):
        data = bytearray(whole)
        damage(data, header, np.random.default_rng(seed))
        path.write_bytes(data)
        seen.append(outcome(path, SPECS[family]))
    print(f"{damage.__name__}: {seen.count('read')} of {len(seen)} read, the others refused")
    assert "refused" in seen
    assert peak_bytes() - before < MAX_BYTES


def test_there_are_enough_damaged_files() -> None:
    assert sum(DAMAGES.values()) >= 800


def test_a_damaged_array_length_is_refused_at_once(tmp_path: Path) -> None:
    """The gguf package's reader would loop 2**40 times, far past the end of the file."""
    path = write_family(tmp_path / "tiny.gguf")
    data = bytearray(path.read_bytes())
    place = (
        data.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    )  # past the types of value and elements
    data[place : place + 8] = (2**40).to_bytes(8, "little")
    data += bytes(-(len(data) - place - 8) % 4)  # so that the file ends with a whole element
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"tiny\.gguf: .* must have at most 16777216 values, got 1099511627776"
    ):
        load_model(path)


def test_what_is_quoted_from_a_damaged_file_is_printable(tmp_path: Path) -> None:
    path = write_family(tmp_path / "tiny.gguf", change={"tokenizer.ggml.merges": ["\x1b[2J\n\x07 x"]})
    with pytest.raises(ValueError, match=r"\\x1b\[2J \\x07") as caught:
        load_model(path)
    assert str(caught.value).isprintable()
