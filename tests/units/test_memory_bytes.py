"""The model of memory, held to a band around what MLX counts; and what it says of shapes."""

from __future__ import annotations

import gc
import random
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from benchmarks.memory_errors import CHECKPOINTED, PACKED, SHORT, Work, needs_and_peaks
from mlx_impl.config import LoRAConfig, ModelConfig, TrainConfig
from mlx_impl.data import Example, evaluation_batches, make_packed_batch, training_windows
from mlx_impl.fast import ops, query_chunks
from mlx_impl.fast.decode import generate_all
from mlx_impl.fast.described import described_sizes
from mlx_impl.fast.kv_cache import GROWTH
from mlx_impl.fast.memory_model import answer_bytes, evaluation_bytes, training_bytes
from mlx_impl.fast.memory_sizes import Shape, Sizes, shape_of, sizes_of
from mlx_impl.fast.segments import SubBatch
from mlx_impl.model import CausalLM
from mlx_impl.run.trainer import LoRATrainer
from tests.lora_ladder.cases import SPEC, random_rows
from tests.nightly import mostly_at_night

pytestmark = pytest.mark.usefixtures("on_the_cpu")

# Of the peak: too low an estimate ends in a signal, too high a one refuses what would do. How far MLX hands
# its CPU work ahead differs from one time to the next, and is a part of the peak.
LEAST, MOST = 0.8, 1.6
NARROW = replace(SPEC, hidden_size=32, intermediate_size=64, num_attention_heads=4, head_dim=8)
WIDE = replace(NARROW, hidden_size=64, intermediate_size=256, head_dim=16, num_hidden_layers=4)
# Most of whose memory is weights.
HEAVY = replace(NARROW, hidden_size=512, intermediate_size=1024, head_dim=128, num_hidden_layers=6)
TIED = replace(HEAVY, tie_word_embeddings=True)


@dataclass(frozen=True)
class Case:
    config: ModelConfig
    tokens: int
    rows: int
    lora: dict[str, Any]
    bits: int
    training: dict[str, Any]


def case(
    config: ModelConfig, tokens: int, rows: int = 1, dora: bool = False, bits: int = 0, **training: Any
) -> Case:
    return Case(config, tokens, rows, {"use_dora": dora}, bits, training)


CASES = {
    "long": case(NARROW, 512),
    "wide, checkpointed": case(WIDE, 128, 4, grad_checkpoint=True),
    "vocabulary": case(replace(WIDE, vocab_size=20000), 64, 2),
    "long, checkpointed": case(NARROW, 512, grad_checkpoint=True),
    "many heads": case(replace(NARROW, num_attention_heads=12, num_key_value_heads=4), 256),
    "many rows": case(WIDE, 64, 8, batch_size=8),
    "packed": case(WIDE, 100, 12, batching="packed", max_seq_length=512, batch_size=2),
    "DoRA": case(WIDE, 256, 2, dora=True),
    "weights, DoRA": case(TIED, 16, 2, dora=True),
    "4 bits": case(TIED, 16, 2, bits=4),
    "4 bits, DoRA": case(TIED, 16, 2, dora=True, bits=4),
    "4 bits, a large head, DoRA": case(replace(HEAVY, vocab_size=8192), 32, dora=True, bits=4),
    "4 bits, a large head": case(replace(HEAVY, vocab_size=8192), 32, bits=4),
}


def measured(run: Any) -> int:
    """The peak of MLX's memory; before it nothing may be held that is not the trainer's."""
    gc.collect()
    mx.synchronize()
    mx.reset_peak_memory()
    run()
    return mx.get_peak_memory()


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("name", mostly_at_night(CASES, 3))
def test_the_need_is_near_what_mlx_counts(name: str, plain: bool) -> None:
    case = CASES[name]
    before = mx.get_active_memory()  # of other tests
    tokens = random_rows(case.config.vocab_size, [case.tokens] * case.rows)
    examples = [Example(tuple(map(int, row)), (True,) * len(row)) for row in tokens]
    training = TrainConfig(iters=3, **{"batch_size": case.rows, **case.training})
    model = CausalLM(case.config)
    if case.bits:
        nn.quantize(model, 32, case.bits)
    mx.eval(model.parameters())
    trainer = LoRATrainer(model, LoRAConfig(rank=4, **case.lora), training, False, plain)
    sizes, checkpointed = sizes_of(model, plain), training.grad_checkpoint
    needs = {
        "evaluation": max(
            evaluation_bytes(sizes, shape_of(batch))
            for batch in evaluation_batches(examples, training.batch_size)
        ),
        "training": max(
            training_bytes(sizes, shape_of(batch), checkpointed)
            for window in training_windows(examples, training)
            for batch in window
        ),
    }
    first = measured(lambda: trainer.evaluate(examples))  # without moments
    peaks = {"training": measured(lambda: list(trainer.fit(examples))) - before}
    later = first if plain else measured(lambda: trainer.evaluate(examples))
    peaks["evaluation"] = max(first, later) - before
    print({what: f"{needs[what] / peaks[what] - 1:+.1%} of {peaks[what]:,}" for what in needs})
    shares = {what: needs[what] / peaks[what] for what in needs}
    assert all(LEAST < share < MOST for share in shares.values()), shares


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointed": {"training": CHECKPOINTED},
    "4 bits": {"bits": 4},
    "8 bits, checkpointed": {"bits": 8, "training": CHECKPOINTED},
    "dropout": {"lora": {"dropout": 0.1}},
    "dropout, checkpointed": {"lora": {"dropout": 0.1}, "training": CHECKPOINTED},
    "DoRA": {"lora": {"use_dora": True}},
    "DoRA, checkpointed": {"lora": {"use_dora": True}, "training": CHECKPOINTED},
    "DoRA, 4 bits": {"lora": {"use_dora": True}, "bits": 4},
    "bfloat16": {"dtype": "bfloat16"},
    "packed": {"lengths": SHORT, "training": PACKED},
    "packed, checkpointed": {"lengths": SHORT, "training": PACKED | CHECKPOINTED},
}
LOWEST, HIGHEST = 0.9, 1.2  # of the peak, in this grid; benchmarks/NOTES.md has what was measured


def drawn(kind: str, draw: random.Random) -> Work:
    """Of this kind, of some size: width, blocks, heads, vocabulary, rows, tokens, rank."""
    width, key_heads = 32 * draw.choice([2, 4, 6, 8]), draw.choice([1, 2])
    model = {
        "hidden_size": width,
        "intermediate_size": 32 * round(width * draw.choice([2, 2.67, 4]) / 32),
        "num_hidden_layers": draw.choice([3, 4, 6]),
        "num_attention_heads": key_heads * draw.choice([2, 4]),
        "num_key_value_heads": key_heads,
        "head_dim": draw.choice([16, 32, 64]),
        "vocab_size": draw.choice([512, 1500, 2048, 4096, 12000, 49152]),
    }
    work = Work((draw.choice([65, 129, 193]),) * draw.choice([2, 4]), model)
    one = replace(work, **KINDS[kind])
    return replace(one, lora=one.lora | {"rank": draw.choice([4, 8, 16])})


@pytest.mark.nightly
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_the_need_of_other_sizes_is_near_what_mlx_counts(kind: str, number: int) -> None:
    shares = [need / peak for need, peak in needs_and_peaks(drawn(kind, random.Random(f"{kind}{number}")))]
    print(f"\n{kind}: " + ", ".join(f"{share - 1:+.1%}" for share in shares))
    assert all(LOWEST < share < HIGHEST for share in shares), shares


FEW = (129, 129)  # tokens of two rows
ON_Q_AND_V = {"target_modules": ("q_proj", "v_proj")}
OTHERS = {
    "one block has an adapter": Work(FEW, lora={"num_layers": 1}),
    "queries and keys have norms": Work(FEW, {"qk_norm": True}),
    "the same, and padding": Work((257, 65, 65, 65), {"qk_norm": True}),
    "a packed head in eight parts": Work(FEW, {"vocab_size": 8192}, bits=4),
    "q and v have adapters": Work(lora=ON_Q_AND_V),
    "q and v, of DoRA": Work(
        model={"hidden_size": 288, "vocab_size": 4096}, lora=ON_Q_AND_V | {"use_dora": True}
    ),
    "a packed head in two chunks of logits": Work(model={"vocab_size": 49152}, bits=4),
    "the same, checkpointed": Work(model={"vocab_size": 49152}, bits=4, training=CHECKPOINTED),
}


@pytest.mark.parametrize("kind", mostly_at_night(OTHERS, 3))
def test_the_need_of_other_models_is_near_what_mlx_counts(kind: str) -> None:
    """Not too low; where only some linears have adapters, an evaluation's peak varies from run to run."""
    shares = [need / peak for need, peak in needs_and_peaks(OTHERS[kind])]
    print(f"\n{kind}: " + ", ".join(f"{share - 1:+.1%}" for share in shares))
    assert all(0.97 < share < 1.3 for share in shares), shares


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
def test_the_need_in_blocks_of_queries_is_near_what_mlx_counts(
    checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tokens = replace(NARROW, num_attention_heads=12, num_key_value_heads=4), 1024
    at_once = training_bytes(sizes_of(CausalLM(config)), Shape(1, tokens, tokens, tokens), checkpointed)
    monkeypatch.setattr(query_chunks, "MAX_SCORES", 2**18)
    name = "long, in blocks"
    monkeypatch.setitem(CASES, name, case(config, tokens, grad_checkpoint=checkpointed))
    test_the_need_is_near_what_mlx_counts(name, plain=False)
    in_blocks = training_bytes(sizes_of(CausalLM(config)), Shape(1, tokens, tokens, tokens), checkpointed)
    assert in_blocks < at_once / 2


def test_scores_that_are_made_again_count_with_their_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chunk of queries: three arrays of scores, each of this chunk and the next, and six of the mask."""
    few, needs = 6 * 2**16, []
    for scores in (few, 2 * few):
        monkeypatch.setattr(query_chunks, "MAX_SCORES", scores)
        needs.append(training_bytes(SIZES, Shape(1, 1024, 1024, 1024), checkpointed=False))
    assert needs[1] - needs[0] == 3 * 2 * 4 * few + 6 * few // SPEC.num_attention_heads


@pytest.mark.parametrize("window", [None, 64])
def test_the_need_of_an_answer_is_near_what_mlx_counts(window: int | None) -> None:
    """A prompt is read with scores for every key, also in a window."""
    before = mx.get_active_memory()
    config = replace(NARROW, num_attention_heads=12, num_key_value_heads=4, sliding_window=window)
    model = CausalLM(config)
    mx.eval(model.parameters())
    (prompt,) = random_rows(config.vocab_size, [512])
    need = answer_bytes(sizes_of(model), Shape(1, len(prompt), len(prompt), 1), 2)
    peak = max(measured(lambda: generate_all(model, [prompt], 2, ())) for _ in range(3)) - before
    assert LEAST < need / peak < MOST, need / peak


SIZES = Sizes(SPEC, weights=1000, trained=10, itemsize=4, more=0, unpacked=0, head=0, keeps_scores=True)


def test_a_cpu_keeps_the_attention_weights_of_every_block_a_gpu_none() -> None:
    shape = Shape(2, 1024, 2048, 1)
    scores = 2 * SPEC.num_attention_heads * 1024 * 1024 * 4
    on_a_gpu = replace(SIZES, keeps_scores=False)
    difference = training_bytes(SIZES, shape, False) - training_bytes(on_a_gpu, shape, False)
    assert SPEC.num_hidden_layers * scores < difference < (SPEC.num_hidden_layers + 4) * scores


def test_checkpointing_and_evaluation_hold_the_attention_weights_of_one_block() -> None:
    shape = Shape(1, 2048, 2048, 1)
    two, three = (replace(SIZES, config=replace(SPEC, num_hidden_layers=n)) for n in (2, 3))
    a_hidden_state = 2048 * SPEC.hidden_size * 4
    assert training_bytes(three, shape, True) - training_bytes(two, shape, True) == a_hidden_state
    assert evaluation_bytes(three, shape) == evaluation_bytes(two, shape)


def test_a_gpu_keeps_queries_and_keys_before_their_norms_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    with_norms, without = (
        described_sizes(replace(HEAVY, qk_norm=has), mx.float32, 32, 0, LoRAConfig()) for has in (True, False)
    )
    heads = HEAVY.num_attention_heads + HEAVY.num_key_value_heads
    assert with_norms.a_position - without.a_position == heads * HEAVY.head_dim


def test_attention_holds_the_padding_of_sub_batches_too() -> None:
    """Queries, keys, values and the mix of every place of their rows; kept once, and once in work."""
    examples = [Example((1,) * (n + 1), (False,) + (True,) * n) for n in (40, 40, 40, 40)]
    shape = shape_of(make_packed_batch(examples, [(0, 1, 2, 3)]))
    ((rows, width),) = shape.sub_batches
    padding, on_a_gpu = rows * width - shape.computed, replace(SIZES, keeps_scores=False)
    full = replace(shape, sub_batches=(SubBatch(1, shape.computed),))
    heads = 2 * (SPEC.num_attention_heads + SPEC.num_key_value_heads)
    more = training_bytes(on_a_gpu, shape, False) - training_bytes(on_a_gpu, full, False)
    assert more >= 4 * SPEC.num_hidden_layers * heads * SPEC.head_dim * padding > 0


def test_attention_holds_what_is_not_computed_of_a_row_too() -> None:
    """Of padding and of a prefix that rows share: queries, keys, values and the mix."""
    shape, on_a_gpu = Shape(4, 64, 256, 8), replace(SIZES, keeps_scores=False)
    shared = replace(shape, computed=112)
    heads = 2 * (SPEC.num_attention_heads + SPEC.num_key_value_heads) * SPEC.head_dim
    all_but_heads = on_a_gpu.a_position - heads
    less = training_bytes(on_a_gpu, shape, False) - training_bytes(on_a_gpu, shared, False)
    assert less == 4 * (SPEC.num_hidden_layers + 1) * all_but_heads * (256 - 112)  # and once in work


def test_beside_a_packed_head_the_last_of_three_weights_is_still_there() -> None:
    """On a GPU, as far as MLX's source tells."""
    shape, weight = Shape(1, 64, 64, 64), 2**20
    packed = replace(SIZES, keeps_scores=False, head=2**24)  # which is the most that a step holds
    one, none = (training_bytes(replace(packed, unpacked=n), shape, False) for n in (3 * weight, 0))
    assert one - none == weight


@pytest.mark.parametrize("bits", [0, 4])
def test_on_a_gpu_dora_also_holds_its_update_and_the_stretched_weight(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large as the largest weight; in training, and in an evaluation before and after."""

    def in_full() -> tuple[int, ...]:
        sizes = described_sizes(HEAVY, mx.float32, 32, bits, LoRAConfig(use_dora=True))
        return (sizes.unpacked, *sizes.evaluated)

    on_a_cpu = in_full()
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    weight = HEAVY.hidden_size * HEAVY.intermediate_size * 4
    assert all(gpu - cpu >= 2 * weight for gpu, cpu in zip(in_full(), on_a_cpu, strict=True))


def test_an_answer_needs_its_cache_twice() -> None:
    """In whole blocks; that of a long prompt beside the scores of a part of it."""
    shape, keys = Shape(1, 8, 8, 1), SPEC.num_key_value_heads * SPEC.head_dim
    more, none = (answer_bytes(SIZES, shape, tokens) for tokens in (GROWTH, 0))
    assert more - none == 2 * GROWTH * 2 * keys * SPEC.num_hidden_layers * 4
    once, twice = (answer_bytes(SIZES, Shape(1, n, n, 1), 0) for n in (1 << 16, 1 << 17))
    assert twice < 2.1 * once
