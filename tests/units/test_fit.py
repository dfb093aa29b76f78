"""`inspect --fit`: what a model that is only described would need, and what then fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_impl.__main__ import main
from mlx_impl.cli.settings.memory_size import parse_memory
from mlx_impl.config import LoRAConfig, ModelConfig
from mlx_impl.data import WIDTH_BUCKETS, bucket_size
from mlx_impl.fast import ops, query_chunks
from mlx_impl.fast.described import described_sizes
from mlx_impl.fast.memory_model import training_bytes
from mlx_impl.fast.memory_sizes import Shape, sizes_of
from mlx_impl.lora import add_lora
from mlx_impl.model import CausalLM
from mlx_impl.run.fit import Setting, largest_batch, longest_row, settings_of
from tests.lora_ladder.cases import SPEC
from tests.tiny_folder import CONFIG, write_gguf

pytestmark = pytest.mark.usefixtures("on_the_cpu")

WIDE = replace(SPEC, hidden_size=64, intermediate_size=128, num_attention_heads=4, head_dim=16)
LARGE = replace(  # the shape of Llama 3.1 70B
    SPEC,
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=False,
)
BITS = {"float32": (mx.float32, 0), "bfloat16": (mx.bfloat16, 0), "4 bits": (mx.float32, 4)}


@pytest.mark.parametrize("num_blocks", [1, 5])
@pytest.mark.parametrize("kind", BITS)
def test_the_sizes_are_those_of_the_model_itself(kind: str, num_blocks: int) -> None:
    dtype, bits = BITS[kind]
    config = replace(WIDE, num_hidden_layers=num_blocks)
    model = CausalLM(config)
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, 32, bits)
    add_lora(model, LoRAConfig())
    assert described_sizes(config, dtype, 32 if bits else 0, bits) == sizes_of(model)


def test_describing_a_large_model_computes_no_array() -> None:
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    weights = described_sizes(LARGE, mx.bfloat16, 64, 4).weights
    assert mx.get_peak_memory() < before + 2**20
    assert 35e9 < weights < 45e9  # 70.6e9 weights of 4.5 bits, and the adapter


def setting(checkpointed: bool = False, config: ModelConfig = WIDE, dtype: mx.Dtype = mx.float32) -> Setting:
    return Setting(8 * dtype.size, "", checkpointed, described_sizes(config, dtype))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_is_named_fits_and_more_does_not(checkpointed: bool) -> None:
    one = setting(checkpointed)
    for limit in (2**22, 2**25, 2**30):
        row, batch = longest_row(one, limit), largest_batch(one, limit, 64)
        assert row == 0 or one.bytes_needed(1, row) <= limit < one.bytes_needed(1, row + 1)
        assert batch == 0 or one.bytes_needed(batch, 64) <= limit < one.bytes_needed(batch + 1, 64)


def test_more_memory_never_fits_less_and_checkpointing_fits_more() -> None:
    limits = [2**n for n in range(20, 34)]
    for of in (longest_row, lambda one, limit: largest_batch(one, limit, 64)):
        kept, checkpointed = ([of(setting(c), limit) for limit in limits] for c in (False, True))
        assert kept == sorted(kept) and checkpointed == sorted(checkpointed)
        assert all(a <= b for a, b in zip(kept, checkpointed, strict=True))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("window", [None, 32])
def test_no_smaller_batch_than_the_one_that_is_named_needs_more_than_there_is(
    window: int | None, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A need falls where scores become so many that they are no longer kept."""
    monkeypatch.setattr(query_chunks, "MAX_SCORES", 2**21)
    monkeypatch.setattr("mlx_impl.run.fit.END", 12)
    one = setting(checkpointed, replace(WIDE, num_hidden_layers=24, sliding_window=window))
    tokens = [bucket_size(n, WIDTH_BUCKETS) for n in (8, 100, 300, 500, 600, 700, 800, 1000)]
    widths = sorted({bucket_size(n, WIDTH_BUCKETS) for n in range(1, 1025)})
    needs = {(r, t): one.bytes_needed(r, t) for r in range(1, 13) for t in widths}
    assert window or checkpointed or needs[6, 384] < needs[3, 384]  # 3.5 rows have so many scores
    for limit in sorted(needs.values())[::10]:
        too_large = [size for size, need in needs.items() if need > limit]
        for most in tokens:
            smallest = min((r for r, t in too_large if t <= most), default=13)
            assert largest_batch(one, limit, most) == smallest - 1
        first = min((t for r, t in too_large if r == 1), default=2000)
        assert longest_row(one, limit, 1024) == max((t for t in widths if t < first), default=0)


def test_of_rows_whose_scores_are_too_many_the_fewest_may_need_the_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a narrow model: the part of the mask that is there at once falls with the rows."""
    monkeypatch.setattr(query_chunks, "MAX_SCORES", 1024 * 1024)  # of one row of 1,024 tokens and one head
    narrow = replace(WIDE, hidden_size=8, intermediate_size=8, head_dim=8, num_hidden_layers=1)
    one = setting(config=replace(narrow, num_attention_heads=1, num_key_value_heads=1))
    first, second, third = (one.bytes_needed(rows, 1024) for rows in (1, 2, 3))
    assert second > max(first, third)
    assert one.most_needed(3, 1024) == second


def test_the_need_is_above_the_memory_models_by_its_error() -> None:
    one = setting()
    shape = Shape(2, 64, 128, 128)
    need = training_bytes(one.sizes, shape, False)
    assert one.bytes_needed(2, 64) == pytest.approx(1.1 * need, rel=1e-6)


TINYLLAMA = replace(
    SPEC,
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=64,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(
    ("rows", "tokens", "bits", "checkpointed", "measured"),  # GB on an H200: benchmarks/NOTES.md
    [
        (4, 1024, 0, False, 9.76),
        (4, 1024, 0, True, 5.37),
        (1, 8192, 0, False, 16.58),
        (1, 16384, 0, True, 13.60),
        (8, 256, 4, False, 5.00),
        (1, 8192, 4, False, 15.17),
        (1, 8192, 4, True, 6.54),
    ],
)
def test_on_cuda_the_need_is_near_what_was_measured(
    rows: int, tokens: int, bits: int, checkpointed: bool, measured: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what the host queues ahead, and without the margin."""
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    sizes = described_sizes(TINYLLAMA, mx.bfloat16, 32 if bits else 0, bits)
    need = Setting(bits or 16, "bfloat16", checkpointed, sizes).bytes_needed(rows, tokens) / 1.1
    assert 0.94 < need / (measured * 1e9) < 1.1


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("64GB", 64 * 10**9), ("8 GiB", 2**33), ("1.5gb", 15 * 10**8), ("512MB", 512 * 10**6), ("1T", 10**12)],
)
def test_an_amount_of_memory_has_a_unit(text: str, num_bytes: int) -> None:
    assert parse_memory(text) == num_bytes


@pytest.mark.parametrize("text", ["", "64", "GB", "-1GB", "0GB", "nanGB", "1e3GB", "64 XB", "9" * 400 + "GB"])
def test_another_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a positive number with a unit, as 64GB"):
        parse_memory(text)


def config_folder(folder: Path, **changes: Any) -> Path:
    """A model of which only config.json is here."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


def fit(model: Path, *flags: str) -> int:
    return main(["inspect", "--model", str(model), "--fit", *flags])


def test_a_config_file_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(config_folder(tmp_path), "--memory", "1GB", "--max-seq-length", "64") == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "0.9 GiB" in shown or "954 MiB" in shown
    for part in ("32 bits", "16 bits", "4 bits", "bfloat16", "--grad-checkpoint", "64 tokens", "CPU", "10%"):
        assert part in shown


def test_the_json_has_every_row_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(config_folder(tmp_path), "--memory", "1GB", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["memory_bytes"] == 10**9 and result["tokens"] == 2048
    kinds = [(row["bits"], row["grad_checkpoint"]) for row in result["settings"]]
    assert kinds == [(bits, c) for bits in (32, 16, 4) for c in (False, True)]
    assert all(row["longest_row"] > 0 and row["largest_batch"] >= 0 for row in result["settings"])


def test_without_an_amount_it_is_this_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(config_folder(tmp_path), "--json") == 0
    assert 2**28 < json.loads(capsys.readouterr().out)["memory_bytes"] < 2**46


def test_the_weights_are_counted_without_the_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Embedding and head of 61 x 32, two norms and seven linears a block, the last norm."""
    folder = config_folder(tmp_path, vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=3)
    assert fit(folder, "--json", "--memory", "1GB") == 0
    c = json.loads((folder / "config.json").read_text())
    keys = c["num_key_value_heads"] * 32 // c["num_attention_heads"]
    block = 2 * 32 + 2 * 32 * 32 + 2 * 32 * keys + 3 * 32 * 64
    tables = 61 * 32 * (1 if c.get("tie_word_embeddings") else 2)
    assert json.loads(capsys.readouterr().out)["num_weights"] == tables + 3 * block + 32


def test_more_tokens_than_the_model_was_made_for_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = config_folder(tmp_path, max_position_embeddings=100)
    for tokens, is_named in (("101", True), ("100", False)):
        assert fit(folder, "--memory", "1GB", "--max-seq-length", tokens) == 0
        sentence = f"the model was made for rows of at most 100 tokens, --max-seq-length is {tokens}"
        assert (sentence in capsys.readouterr().out) == is_named
    assert fit(folder, "--memory", "1GB", "--json") == 0
    assert json.loads(capsys.readouterr().out)["max_tokens"] == 100


@pytest.mark.parametrize(("most", "named"), [(1, "1 token,"), (2048, "2,048 tokens,")])
def test_tokens_are_counted_as_in_the_table(
    most: int, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = config_folder(tmp_path, max_position_embeddings=most)
    assert fit(folder, "--memory", "1GB", "--max-seq-length", "100000") == 0
    assert f"at most {named} --max-seq-length is 100,000" in capsys.readouterr().out
    assert fit(folder, "--memory", "1GB", "--max-seq-length", "1") == 0
    assert "rows of up to 1 token (" in capsys.readouterr().out


@pytest.mark.parametrize(("heads", "is_told"), [(5, True), (4, False)])
def test_why_4_bits_are_left_out_is_told(
    heads: int, is_told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    width = 8 * heads
    folder = config_folder(tmp_path, hidden_size=width, num_attention_heads=heads, num_key_value_heads=heads)
    assert fit(folder, "--memory", "1GB") == 0
    shown = capsys.readouterr().out
    assert ("4 bits are left out: not every width of the model is a multiple of 32" in shown) == is_told
    assert ("4 bits  " in shown) != is_told
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_a_model_too_large_fits_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(config_folder(tmp_path), "--memory", "100kB") == 0
    assert "does not fit" in capsys.readouterr().out


def test_a_row_is_no_longer_than_the_model_can_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = config_folder(tmp_path, max_position_embeddings=100)
    assert fit(folder, "--memory", "1TB", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["settings"]
    assert {row["longest_row"] for row in rows} == {100}


def test_stored_quantization_takes_the_place_of_4_bits(tmp_path: Path) -> None:
    from mlx_impl.files.described import read_description

    folder = config_folder(tmp_path, quantization={"group_size": 32, "bits": 8})
    assert [one.bits for one in settings_of(read_description(folder))] == [32, 32, 16, 16, 8, 8]


def test_what_cannot_be_quantized_has_no_row_of_4_bits(tmp_path: Path) -> None:
    from mlx_impl.files.described import read_description

    folder = config_folder(tmp_path, hidden_size=40, num_attention_heads=5, num_key_value_heads=5)
    assert {one.bits for one in settings_of(read_description(folder))} == {32, 16}


def test_a_gguf_file_is_described_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(write_gguf(tmp_path / "tiny.gguf"), "--memory", "1GB") == 0
    assert "tiny.gguf" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": 2**31}, "hidden_size must be less than 2147483648, got 2147483648"),
        ({"vocab_size": 10**30}, "vocab_size must be less than"),
        ({"head_dim": 2**30}, "num_attention_heads * head_dim must be less than"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number, got '32'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"max_position_embeddings": -1}, "max_position_embeddings must be at least 1, got -1"),
        ({"quantization": {"group_size": 32, "bits": 7}}, "cannot be quantized with 7 bits in groups of 32"),
        ({"quantization": {"group_size": 32}}, "quantization lacks the key 'bits'"),
        ({"model_type": "mamba"}, "mamba"),
        ({"hidden_size": 4, "head_dim": 2}, "rank must be at most 4"),
    ],
)
def test_a_wrong_config_gets_one_sentence(
    changes: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(config_folder(tmp_path, **changes)) == 2
    told = capsys.readouterr().err
    assert sentence in told and "config.json" in told and told.count("\n") == 1


def test_many_blocks_take_no_time(tmp_path: Path) -> None:
    assert fit(config_folder(tmp_path, num_hidden_layers=10**12), "--memory", "1GB") == 0


def test_memory_without_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--model", str(config_folder(tmp_path)), "--memory", "1GB"]) == 2
    assert "--memory needs --fit" in capsys.readouterr().err
