"""Answers token by token and piece by piece: the cache changes nothing, and no character is ever cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mlx_impl.fast import answer, kv_cache, ops, reading
from mlx_impl.fast.decode import generate_all
from mlx_impl.files.checkpoint import load_model
from mlx_impl.generate import generate, most_likely
from mlx_impl.model import CausalLM
from mlx_impl.text.streaming import stream_text
from tests.tiny_folder import write_folder

NUM_TOKENS = 24
PROMPTS = [[7], [5, 9], [11, 200, 31, 4, 4, 90, 17], list(range(3, 60))]
NEVER: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    return load_model(write_folder(tmp_path_factory.mktemp("model"))).model


def without_a_cache(model: CausalLM, prompt: list[int], num_tokens: int) -> list[int]:
    """The whole text read anew for every token."""
    text = list(prompt)
    for _ in range(num_tokens):
        text.append(int(mx.argmax(model(mx.array([text]))[0, -1]).item()))
    return text[len(prompt) :]


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_the_cache_changes_no_token(model: CausalLM, prompt: list[int]) -> None:
    expected = without_a_cache(model, prompt, NUM_TOKENS)
    assert len(set(expected)) > 1
    assert list(generate(model, prompt, NUM_TOKENS, NEVER)) == expected
    assert list(answer.generate(model, prompt, NUM_TOKENS, NEVER)) == expected
    assert generate_all(model, PROMPTS, NUM_TOKENS, NEVER)[PROMPTS.index(prompt)] == expected


@pytest.mark.parametrize("window", [12, 24, 30])
def test_a_window_is_counted_in_tokens_of_the_own_row(tmp_path: Path, window: int) -> None:
    """After a prefix that all rows share: the gap of a shorter row is no part of its window."""
    config = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    model = load_model(write_folder(tmp_path, **config)).model
    assert model.model.window == window
    prompts = [[*range(60, 80), *range(100 + count, 100 + 2 * count)] for count in (1, 2, 5, 40)]
    alone = [list(generate(model, prompt, NUM_TOKENS, NEVER)) for prompt in prompts]
    assert generate_all(model, prompts, NUM_TOKENS, NEVER) == alone


def test_every_stop_token_ends_the_answer_and_is_not_part_of_it(model: CausalLM) -> None:
    """The first of several to come; a stop token in the prompt stops nothing."""
    free = list(generate(model, PROMPTS[2], NUM_TOKENS, NEVER))
    early, late = free[4], free[-1]
    for stop_ids in ({early}, {early, late}, {late, early, *PROMPTS[2]}):
        expected = free[: min(free.index(token) for token in stop_ids if token in free)]
        assert list(generate(model, PROMPTS[2], NUM_TOKENS, stop_ids)) == expected
        assert list(answer.generate(model, PROMPTS[2], NUM_TOKENS, stop_ids)) == expected
        assert generate_all(model, [PROMPTS[0], PROMPTS[2]], NUM_TOKENS, stop_ids)[1] == expected


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("size", [1, 2, 7, 25])
def test_tokens_depend_neither_on_the_room_of_a_cache_nor_on_parts_of_a_prompt(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch, size: int, on_gpu: bool
) -> None:
    """GROWTH, PROMPT_POSITIONS, PROMPT_POSITIONS_ON_A_GPU, MAX_AHEAD and MAX_BYTES_AHEAD."""
    expected = [list(generate(model, prompt, NUM_TOKENS, NEVER)) for prompt in PROMPTS]
    monkeypatch.setattr(ops, "on_gpu", lambda: on_gpu)
    monkeypatch.setattr(kv_cache, "GROWTH", size)
    monkeypatch.setattr(answer, "MAX_AHEAD", size)
    monkeypatch.setattr(answer, "MAX_BYTES_AHEAD", 2**29 if size == 1 else 1000 * size)
    monkeypatch.setattr(reading, "PROMPT_POSITIONS", size)
    monkeypatch.setattr(reading, "PROMPT_POSITIONS_ON_A_GPU", size)
    assert [list(answer.generate(model, prompt, NUM_TOKENS, NEVER)) for prompt in PROMPTS] == expected
    assert generate_all(model, PROMPTS, NUM_TOKENS, NEVER) == expected
    shared = [[*PROMPTS[3], *prompt] for prompt in PROMPTS]
    alone = [list(generate(model, prompt, NUM_TOKENS, NEVER)) for prompt in shared]
    assert generate_all(model, shared, NUM_TOKENS, NEVER) == alone


def test_a_cache_with_room_is_written_in_place() -> None:
    """Of 257 tokens, one at a time, two make a new array; a copy a token would make 257."""
    cache, made = kv_cache.KVCache(), set()
    for number in range(kv_cache.GROWTH + 1):
        token_BGTK = mx.full((1, 2, 1, 4), number)
        keys_BGSK, _ = cache.extend(token_BGTK, token_BGTK)
        assert cache.keys_BGCK is not None
        made.add(cache.keys_BGCK.shape[2])
        assert keys_BGSK[0, 1, :, 3].tolist() == list(range(number + 1))
    assert made == {kv_cache.GROWTH, 2 * kv_cache.GROWTH}


@pytest.mark.parametrize(
    ("on_gpu", "most", "expected"),
    [
        (True, 2**29, "build queue build queue read build queue read read"),
        (True, 0, "build queue build read queue build read queue read"),
        (False, 2**29, "build queue build queue read build queue read read"),
        (False, 0, "build queue read build queue read build queue read"),
    ],
)
def test_a_token_is_queued_ahead_unless_the_cache_would_be_copied(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch, on_gpu: bool, most: int, expected: str
) -> None:
    """MLX copies a cache that an earlier step still uses; a GPU's next graph is built ahead all the same."""
    done: list[str] = []

    def logged(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object) -> object:
            done.append(name)
            return function(*given)

        return call

    monkeypatch.setattr(ops, "on_gpu", lambda: on_gpu)
    monkeypatch.setattr(answer, "MAX_AHEAD", most)
    monkeypatch.setattr(answer, "MAX_BYTES_AHEAD", most)
    monkeypatch.setattr(mx, "async_eval", logged("queue", mx.async_eval))
    for name, function in {"build": "chosen", "read": "finite_tokens"}.items():
        monkeypatch.setattr(answer, function, logged(name, getattr(answer, function)))
    list(answer.generate(model, PROMPTS[2], 3, NEVER))
    assert " ".join(done) == expected


def test_drawn_tokens_are_those_of_the_plain_code(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of a second answer, on a GPU too: no draw is made ahead."""

    def two_answers(how: Callable[..., Iterator[int]], end: int) -> list[list[int]]:
        mx.random.seed(4)
        limits = ((NUM_TOKENS, {end}), (NUM_TOKENS, NEVER))
        return [list(how(model, PROMPTS[2], *limit, mx.random.categorical)) for limit in limits]

    end = two_answers(generate, -1)[0][3]
    expected = two_answers(generate, end)
    assert len(expected[0]) == 3 and expected[0] != expected[1][:3]
    for on_gpu in (False, True):
        monkeypatch.setattr(ops, "on_gpu", lambda on_gpu=on_gpu: on_gpu)
        assert two_answers(answer.generate, end) == expected


def test_one_logit_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    """Of one row of the head; the argmax of the others would be a token like any."""
    model = load_model(write_folder(tmp_path)).model
    model.lm_head.weight[9] = float("inf")
    for how in (generate, answer.generate):
        for choose in (most_likely, mx.random.categorical):
            with pytest.raises(ValueError, match="logits must be finite, got infinity or NaN"):
                list(how(model, PROMPTS[2], 3, NEVER, choose))
    with pytest.raises(ValueError, match="logits must be finite, got infinity or NaN"):
        generate_all(model, PROMPTS, 3, NEVER)


def byte_level(*tokens: str) -> Tokenizer:
    """Byte-level BPE without merges: every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    return tokenizer


def metaspace() -> Tokenizer:
    """As Llama 2 has it: words with a mark for the space before them, and bytes for what is no word."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hello", "▁big", "▁world", "ly", "!"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def streamed(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    return list(stream_text(tokens, lambda some: str(tokenizer.decode(list(some), skip_special_tokens=True))))


@pytest.mark.parametrize("text", ["N'Djaména", "日本語 🇱🇮 👩‍🔬!", " a  b\n", "", "\ufffd is a character"])
def test_a_character_of_several_tokens_comes_whole(text: str) -> None:
    """Never half of one, nothing twice, nothing lost; each character as soon as its last byte is there."""
    tokenizer = byte_level()
    shown = streamed(tokenizer, tokenizer.encode(text).ids)
    assert "".join(shown) == text
    if "\ufffd" not in text:
        assert shown == list(text)


def test_bytes_that_are_no_character_are_shown_as_such_in_the_end() -> None:
    tokenizer = byte_level()
    broken = tokenizer.encode("é!").ids
    assert streamed(tokenizer, [broken[0]]) == ["\ufffd"]
    assert streamed(tokenizer, [broken[0], broken[2]]) == ["\ufffd!"]


def test_special_tokens_are_not_shown() -> None:
    tokenizer = byte_level("<end>")
    assert streamed(tokenizer, tokenizer.encode("a<end>b").ids) == ["a", "b"]


def test_spaces_between_words_are_kept_and_the_first_is_not_shown() -> None:
    tokenizer = metaspace()
    words = [
        "▁Hello",
        "▁big",
        "▁world",
        "ly",
        "<0xE2>",
        "<0x82>",
        "<0xAC>",
        "<0xC3>",
        "<0xA9>",
        "▁world",
        "!",
    ]
    tokens = [tokenizer.get_vocab()[word] for word in words]
    assert "".join(streamed(tokenizer, tokens)) == "Hello big worldly€é world!" == tokenizer.decode(tokens)
    assert streamed(tokenizer, tokens)[:4] == ["Hello", " big", " world", "ly"]


def test_a_piece_comes_before_the_next_token_is_asked_for() -> None:
    asked = 0

    def counted() -> Iterator[int]:
        nonlocal asked
        for token in (65, 66, 67):
            asked += 1
            yield token

    for number, piece in enumerate(stream_text(counted(), lambda some: "".join(map(chr, some))), 1):
        assert asked == number and piece == chr(64 + number)
