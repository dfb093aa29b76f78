"""Every size in mlx_impl is crossed in a test, or is said to be none.

A chunk, pool, bucket or batch is larger than anything in a tiny test. So a bug beyond it shows only in a real
run. Here every number that is a constant of a module is in a table, with the small value at which a test
crosses it, with the test file that crosses it, or with the reason why it is no size. A new one fails.
"""

from __future__ import annotations

import ast
import json
from importlib import import_module
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_impl
from mlx_impl import ops
from mlx_impl.batching import window_rows
from mlx_impl.config import TrainConfig
from mlx_impl.data import Example, make_batch
from mlx_impl.fast.decode import generate_all
from mlx_impl.generate import generate
from mlx_impl.text.template import json_batches
from tests.derived import compare, require
from tests.lora_ladder import numpy_ops
from tests.lora_ladder.cases import (
    PROMPT_COUNTS,
    TOKEN_COUNTS,
    Case,
    named_case,
    one_prompt_batch,
    random_rows,
)
from tests.lora_ladder.protocol import Arrays
from tests.trainers.mlx_impl import MlxTrainer
from tests.units.test_fast_equals_plain import Trainer, answers, build, require_exact

ROOT, UNITS = Path(mlx_impl.__file__).parent, Path(__file__).parent
V = 61

# Small values of the sizes of training: fast must still equal plain in float64 to 1e-12.
OF_TRAINING: dict[str, tuple[float, ...]] = {
    "data.SMALLEST_BUCKET": (1, 3),
    "data.WIDTH_BUCKETS": (1, 64),
    "fast.cpu_ops.PIECE": (2, 7),
    "fast.head.CHUNK_LOGITS": (1, 2 * V + 1, 5 * V),
    "fast.kept_positions.KEPT_BUCKETS": (1, 64),
    "fast.kept_positions.MIN_SHARED_FRACTION": (0.0, 10.0),
    "fast.kept_positions.TARGET_BUCKETS": (1, 64),
}
# Those that have a test of their own below.
OF_OTHERS = (
    "batching.POOL",
    "fast.decode.MAX_ROWS",
    "ops.PIECE",
    "text.template.MAX_BATCH_BYTES",
    "text.template.MAX_BATCH_ROWS",
)

# The files in tests/units that cross it; each names it.
ELSEWHERE = {
    "cli.screen.console.LOG_SECONDS": "test_eval_examples.py",
    "fast.band.MAX_SCORES": "test_band.py",
    "fast.answer.MAX_AHEAD": "test_generation.py",
    "fast.answer.MAX_BYTES_AHEAD": "test_generation.py",
    "fast.band.MIN_CHUNK": "test_band.py",
    "fast.band.MIN_TOKENS": "test_band.py",
    "fast.band.MIN_WINDOWS": "test_band.py",
    "fast.kv_cache.GROWTH": "test_generation.py",
    "fast.memory_model.UPDATE": "test_memory_model.py",
    "fast.pace.BLOCKS_AHEAD": "test_pace.py",
    "fast.head.PACKED_ROWS": "test_packed.py",
    "fast.packed.CUDA_MIN_ROWS": "test_packed.py",
    "fast.packed_modules.MIN_ROWS": "test_packed.py",
    "fast.segments.MAX_SUB_BATCHES": "test_segments.py",
    "fast.query_chunks.MAX_SCORES": "test_query_chunks.py",
    "fast.reading.PROMPT_POSITIONS": "test_generation.py",
    "fast.reading.PROMPT_POSITIONS_ON_A_GPU": "test_generation.py",
    "files.formats.gguf.PART_BYTES": "test_gguf.py",
    "files.formats.hf_folder.MAX_SHARD_BYTES": "test_fusing.py",
    "machine.memory_limits.UNUSED_BYTES": "test_memory_limits.py",
    "run.memory_check.MAX_ROWS_CHECKED": "test_memory_check.py",
    "run.ranks.SLICE": "test_ranks.py",
    "text.data_files.MAX_LINE_BYTES": "test_data_files.py",
    "text.turn_probe.MIN_TOGETHER": "test_turn_probe.py",
    "text.template_process.MAX_BYTES": "test_template_limits.py",
    "text.template_process.MAX_CPU_SECONDS": "test_template_limits.py",
    "text.template_process.MAX_SILENT_SECONDS": "test_template_limits.py",
}

IN_MLX = "a number in MLX's source"
MEASURED = "part of a memory estimate, which tests/units/test_memory_bytes.py holds to MLX's own peak"
MESSAGE = "how much of something a message shows"
SCREEN = "what the screen shows, not what is computed"
DEFAULT = "the default of a setting"
REFUSED = "more is refused, so nothing is computed beyond it"
TIME = "a time"
NUMBER = "a number that the format or the operating system gives"
NO_SIZE = {
    "__main__.EXIT_BAD_INPUT": NUMBER,
    "__main__.EXIT_BROKEN_PIPE": NUMBER,
    "cli.address_space_probe.MATRIX_SIZE": "only starts a BLAS's threads; its result is thrown away",
    "cli.evaluate.MAX_NATS": REFUSED,
    "cli.screen.console.REFRESH_SECONDS": SCREEN,
    "cli.inspect.MAX_BAR": SCREEN,
    "cli.inspect.MAX_BINS": SCREEN,
    "cli.screen.curve.MIN_SMOOTHED_STEPS": SCREEN,
    "cli.screen.curve.NUM_WINDOWS": SCREEN,
    "cli.screen.examples.NUM_BEFORE": SCREEN,
    "cli.screen.report.EXAMPLES_SHOWN": SCREEN,
    "cli.screen.report.STEPS_PER_LINE": SCREEN,
    "cli.settings.config_file.MAX_TOML_BYTES": REFUSED,
    "cli.settings.config_file.MAX_YAML_BYTES": REFUSED,
    "cli.settings.train_flags.DEFAULT_EPOCHS": DEFAULT,
    "cli.screen.answer_tables.MAX_ROWS": SCREEN,
    "cli.screen.answer_tables.OPEN_ROWS": SCREEN,
    "cli.screen.plot.HEIGHT": SCREEN,
    "cli.screen.plot.MAX_POINTS": SCREEN,
    "cli.screen.plot.NUM_TICKS": SCREEN,
    "cli.screen.plot.WIDTH": SCREEN,
    "cli.screen.report.SHOWN_CHARACTERS": SCREEN,
    "cli.training.answers.MIN_TOKENS": DEFAULT,
    "cli.training.evaluation.MAX_NATS": "above it the report has no perplexity, which would overflow",
    "cli.training.evaluation.SHOWN_CHARACTERS": SCREEN,
    "cli.training.job.NUM_VALIDATIONS": DEFAULT,
    "cli.training.samples.CANDIDATES": DEFAULT,
    "cli.training.samples.MAX_SAMPLE_TOKENS": DEFAULT,
    "cli.training.samples.MAX_START": DEFAULT,
    "cli.training.samples.NUM_LONGEST": DEFAULT,
    "cli.training.samples.NUM_SAMPLES": DEFAULT,
    "cli.training.lock.MAX_BYTES": REFUSED,
    "config.LARGEST_FLOAT32": REFUSED,
    "disk.files.MAX_JSON_BYTES": REFUSED,
    "disk.files.MAX_REASON": MESSAGE,
    "disk.journal.MAX_BYTES": REFUSED,
    "disk.journal.MAX_IDLE_SECONDS": TIME,
    "disk.journal.MAX_NAME": "how much of a file's name its temporary name repeats, beside 64 random bits",
    "fast.described.END": REFUSED,
    "fast.memory_linears.FLOAT": MEASURED,
    "fast.memory_model.AHEAD": MEASURED,
    "fast.memory_work.PLAIN_EVALUATED_LOGITS": MEASURED,
    "fast.memory_work.PLAIN_LOGITS": MEASURED,
    "fast.memory_sizes.PLAIN_MORE": MEASURED,
    "fast.memory_work.LOGITS": MEASURED,
    "fast.memory_scores.CUDA_MASKS": IN_MLX,
    "fast.memory_scores.CUDA_TILE": IN_MLX,
    "fast.memory_scores.QUERY_CHUNKS": MEASURED,
    "fast.band.QUARTER": "a share; chunks of one and of several are crossed in test_band.py by MIN_CHUNK",
    "fast.memory_in_full.HEAD_PARTS": MEASURED,
    "fast.memory_linears.LINEARS": "of a block",
    "fast.memory_work.NEXT_CHUNKS": MEASURED,
    "fast.memory_cpu.FEW_PARTS_AT_ONCE": MEASURED,
    "fast.memory_cpu.MANY_PARTS_AT_ONCE": MEASURED,
    "fast.memory_cpu.PARTS_AHEAD": MEASURED,
    "fast.memory_model.STATE": MEASURED,
    "fast.row_lengths.UNIT_ROUNDOFF": "a property of float32",
    "files.checkpoint.DEQUANTIZING_EIGHTHS": MEASURED,
    "files.checkpoint.MAX_WEIGHTS_PER_WORD": MEASURED,
    "files.formats.gguf_config.FACTOR_TOLERANCE": "a tolerance",
    "files.formats.gguf_file.ARRAY": NUMBER,
    "files.formats.gguf_file.LENGTH_BYTES": NUMBER,
    "files.formats.gguf_file.MAX_ARRAY": REFUSED,
    "files.formats.gguf_file.MAX_QUOTE": MESSAGE,
    "files.formats.gguf_file.STRING": NUMBER,
    "files.formats.gguf_writer.MAX_UINT32": "the largest number of a format",
    "run.fit.BITS": DEFAULT,
    "run.fit.END": "where a search ends that finds what a table shows",
    "run.fit.MARGIN_PERCENT": "the error of an estimate, as measured",
    "run.ranks.JOIN_TIMEOUT": TIME,
    "run.ranks.TIMEOUT": TIME,
    "run.watchdog.EXIT_LOST": NUMBER,
    "run.watchdog.PATIENCE": TIME,
    "files.formats.hf_config.DEFAULT_WINDOW": DEFAULT,
    "files.formats.hf_config.QWEN3_HEAD_DIM": DEFAULT,
    "files.formats.hf_config.QWEN_FIRST_WINDOW": DEFAULT,
    "files.fusing.LARGE_ERROR": "from here on there is a warning",
    "machine.address_space.M_ARENA_MAX": "a constant of glibc",
    "run.memory_check.MIN_SEQ_LENGTH": "the least that a message suggests",
    "text.data_folder.MAX_LISTED": MESSAGE,
    "text.rows.MAX_LISTED": MESSAGE,
    "text.template_process.CHECK_SECONDS": TIME,
    "text.template_process.MAX_ANSWER_BYTES": REFUSED,
    "text.template_process.MAX_SPARE_BYTES": "whether a process is kept for the next template",
    "text.template_worker.HARD_BYTES": REFUSED,
    "text.template_worker.HARD_CPU_SECONDS": TIME,
    "text.template_worker.HEARTBEAT_SECONDS": TIME,
    "text.template_worker.LENGTH_PER_BYTE": REFUSED,
    "text.template_worker.MAX_ANSWERS_LENGTH": "how much comes in one message; the parent asks for the rest",
    "text.template_worker.MIN_LENGTH_LIMIT": REFUSED,
}


def is_number(value: ast.expr) -> bool:
    """A number, or a sum, product or power of numbers."""
    if isinstance(value, ast.BinOp):
        return is_number(value.left) and is_number(value.right)
    if isinstance(value, ast.UnaryOp):
        return is_number(value.operand)
    return isinstance(value, ast.Constant) and type(value.value) in (int, float)


def numbers_of(source: str) -> list[str]:
    """The names in capitals that a module binds to numbers."""
    found = []
    for line in ast.parse(source).body:
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        value = getattr(line, "value", None)
        for target in targets:
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=True))
            found += [
                t.id for t, v in pairs if isinstance(t, ast.Name) and t.id.isupper() and v and is_number(v)
            ]
    return found


def test_every_number_is_crossed_or_is_said_to_be_no_size() -> None:
    """Exactly the constants of mlx_impl are in the tables, each once."""
    constants = {
        f"{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}.{name}"
        for path in ROOT.rglob("*.py")
        for name in numbers_of(path.read_text(encoding="utf-8"))
    }
    listed = [*OF_TRAINING, *OF_OTHERS, *ELSEWHERE, *NO_SIZE]
    assert len(listed) == len(set(listed))
    assert not constants - set(listed), "not in a table of test_sizes.py"
    assert not set(listed) - constants, "in a table of test_sizes.py, but gone"


def test_a_new_number_is_seen() -> None:
    """In every form in which a module may bind it; a text or a list is none."""
    source = "SIZE = 3\nTWO: int = 2**25\nA, B = -1, 2.5\nNAME = 'x'\nLIST = [1]\nsmall = 2\nTRUE = True\n"
    assert numbers_of(source) == ["SIZE", "TWO", "A", "B"]


@pytest.mark.parametrize(("name", "file"), ELSEWHERE.items())
def test_the_file_that_crosses_it_names_it(name: str, file: str) -> None:
    assert name.rpartition(".")[2] in (UNITS / file).read_text(encoding="utf-8")


def patched(monkeypatch: pytest.MonkeyPatch, name: str, value: float) -> None:
    module, _, constant = name.rpartition(".")
    monkeypatch.setattr(import_module(f"mlx_impl.{module}"), constant, value)


def examples_of(vocab_size: int) -> list[Example]:
    """Rows of unequal length, one of one token and one without a target."""
    rows = random_rows(vocab_size, (*TOKEN_COUNTS, 1, 5))
    prompts = (*PROMPT_COUNTS, 1, 5)
    return [
        Example(tuple(row), tuple(n >= prompt for n in range(len(row))))
        for row, prompt in zip(rows, prompts, strict=True)
    ]


def everything(kind: Trainer, case: Case) -> Arrays:
    """Loss and gradients of both kinds of batch, and two updates by them."""
    batches = [make_batch(examples_of(case.spec.vocab_size)), one_prompt_batch(case.spec.vocab_size)]
    built = build(kind, case)
    found: Arrays = {}
    for number, batch in enumerate(batches):
        found |= {f"{name} of batch {number}": array for name, array in answers(built, batch).items()}
    training = TrainConfig(iters=2, learning_rate=2.0**-6, weight_decay=0.125)
    losses = built.train([[batch] for batch in batches], training)
    return found | {"losses": np.array(losses), **built.factors()}


@pytest.mark.parametrize(
    ("name", "small"), [(name, v) for name, values in OF_TRAINING.items() for v in values]
)
def test_training_does_not_depend_on_it(monkeypatch: pytest.MonkeyPatch, name: str, small: float) -> None:
    """Fast equals plain in float64 to 1e-12: loss, number of targets, gradients and two updates."""
    patched(monkeypatch, name, small)
    monkeypatch.setattr("tests.units.test_fast_equals_plain.kept_positions", lambda batch: True)
    require_exact(named_case("untied"), everything)


@pytest.mark.parametrize("piece", [2, 3, 7, 200])
def test_the_log_of_a_sum_does_not_depend_on_its_pieces(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """`ops.PIECE` terms at a time, value and gradient, against NumPy."""
    monkeypatch.setattr(ops, "PIECE", piece)
    x_NV = (3 * np.random.default_rng(2).standard_normal((5, 199))).astype(np.float32)
    g_N = np.random.default_rng(3).standard_normal(5).astype(np.float32)
    (value,), (gradient,) = mx.vjp(ops.logsumexp, [mx.array(x_NV)], [mx.array(g_N)])

    single, double = (
        (numpy_ops.logsumexp(x_NV.astype(dtype)), numpy_ops.logsumexp_pullback(x_NV.astype(dtype), g_N))
        for dtype in (np.float32, np.float64)
    )
    of_value = compare("value", np.array(value), single[0], double[0], 199)
    of_gradient = compare("gradient", np.array(gradient), single[1], double[1], 199)
    require(f"PIECE = {piece}", [of_value, of_gradient])


@pytest.mark.parametrize("pool", [1, 2, 3])
def test_an_epoch_has_every_example_once_whatever_the_pool(
    monkeypatch: pytest.MonkeyPatch, pool: int
) -> None:
    """`batching.POOL` batches at a time are sorted by length; the last pool may be smaller."""
    patched(monkeypatch, "batching.POOL", pool)
    lengths = np.random.default_rng(3).integers(1, 40, 61).tolist()
    training = TrainConfig(iters=1, batch_size=4, batching="grouped")
    batches = [batch for batch, *_ in islice(window_rows(lengths, training, 0), 16)]
    assert sorted(number for batch in batches for (number,) in batch) == list(range(61))
    assert [len(batch) for batch in batches].count(4) == 15


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6])
def test_answers_do_not_depend_on_how_many_are_decoded_together(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """`fast.decode.MAX_ROWS` prompts at a time; six prompts, the last batch whole or not."""
    patched(monkeypatch, "fast.decode.MAX_ROWS", rows)
    model = build(MlxTrainer, named_case("untied")).model
    prompts = random_rows(V, (3, 1, 9, 4, 1, 7))
    alone = [list(generate(model, prompt, 4, stop_ids=())) for prompt in prompts]
    assert generate_all(model, prompts, 4, stop_ids=()) == alone


@pytest.mark.parametrize(("rows", "size"), [(1, 10**6), (2, 10**6), (7, 10**6), (64, 1), (64, 150)])
def test_every_row_is_rendered_once_however_many_go_together(
    monkeypatch: pytest.MonkeyPatch, rows: int, size: int
) -> None:
    """`text.template.MAX_BATCH_ROWS` rows, or somewhat more than MAX_BATCH_BYTES bytes, a request."""
    patched(monkeypatch, "text.template.MAX_BATCH_ROWS", rows)
    patched(monkeypatch, "text.template.MAX_BATCH_BYTES", size)
    given = [([{"role": "user", "content": "x" * number}], None) for number in range(15)]
    batches = list(json_batches(given))
    assert [json.loads(row) for batch in batches for row in batch] == [list(row) for row in given]
    assert len(batches) > 1 and max(map(len, batches)) <= rows
