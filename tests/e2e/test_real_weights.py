"""SmolLM2's real weights: our logits and greedy tokens are PyTorch's; its tokenizer does as published."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mlx_impl.config import ModelConfig
from mlx_impl.files.checkpoint import default_model_path
from mlx_impl.files.formats.gguf import read_gguf
from mlx_impl.files.formats.gguf_tokenizer import tokenizer_from_gguf
from mlx_impl.text.tokenizer import ChatTokenizer
from reference.generate import generate
from reference.model import CausalLM, load_arrays
from tests.derived import FACTOR, assert_within_rounding
from tests.e2e.conftest import ROOT, run_module

GOLDEN = json.loads((ROOT / "fixtures" / "smollm2" / "golden.json").read_text(encoding="utf-8"))
QUESTION = GOLDEN["question"]
NUM_TOKENS = 10
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.fixture(scope="module")
def loaded() -> tuple[ModelConfig, dict[str, np.ndarray], ChatTokenizer]:
    config, weights, metadata = read_gguf(default_model_path())
    return config, weights, tokenizer_from_gguf(metadata, default_model_path())


@pytest.fixture(scope="module")
def tokenizer(loaded: tuple[ModelConfig, dict[str, np.ndarray], ChatTokenizer]) -> ChatTokenizer:
    return loaded[2]


@pytest.fixture(scope="module")
def reference(loaded: tuple[ModelConfig, dict[str, np.ndarray], ChatTokenizer]) -> CausalLM:
    config, weights, _ = loaded
    model = CausalLM(config)
    load_arrays(model, weights)
    return model.double()


@pytest.fixture(scope="module")
def answer(reference: CausalLM, tokenizer: ChatTokenizer) -> tuple[list[int], list[int], np.ndarray]:
    """The prompt, the reference's greedy tokens, and the logits that chose them, in float64."""
    prompt = tokenizer.encode_prompt([{"role": "user", "content": QUESTION}])
    logits: list[torch.Tensor] = []

    def choose(logits_V: torch.Tensor) -> torch.Tensor:
        logits.append(logits_V)
        return logits_V.argmax()

    tokens = list(generate(reference, prompt, NUM_TOKENS, stop_ids=(), choose=choose))
    return prompt, tokens, torch.stack(logits).numpy()


@pytest.fixture(scope="module")
def logits32(reference: CausalLM, answer: tuple[list[int], list[int], np.ndarray]) -> np.ndarray:
    """The reference's logits at every position of prompt and answer, in float32."""
    prompt, tokens, _ = answer
    with torch.no_grad():
        logits_BTV = reference.float()(torch.tensor([prompt + tokens]))
    reference.double()
    return np.asarray(logits_BTV[0].numpy())


def test_logits_equal_the_reference(
    answer: tuple[list[int], list[int], np.ndarray], logits32: np.ndarray, tmp_path: Path
) -> None:
    """Where the answer is chosen: 10 x 49152 logits of thirty layers, within the derived bound."""
    prompt, tokens, logits64 = answer
    path = tmp_path / "logits.npy"
    run_module("tests.e2e.write_logits", str(path), *map(str, prompt + tokens))
    chosen = slice(len(prompt) - 1, -1)
    ours, ref32 = np.load(path)[chosen], logits32[chosen]
    arms = ({"logits": ours}, {"logits": ref32}, {"logits": logits64})
    assert_within_rounding("real weights, forward", *arms, longest_sum=1536)


def test_greedy_tokens_equal_the_reference(
    answer: tuple[list[int], list[int], np.ndarray], logits32: np.ndarray
) -> None:
    """Token for token, as far as float32 can decide: a lead below twice the bound decides nothing."""
    prompt, tokens, logits64 = answer
    arguments = ("--prompt", QUESTION, "--max-tokens", str(NUM_TOKENS), "--json")
    ours = json.loads(run_module("mlx_impl", "generate", *arguments))
    assert ours["prompt_tokens"] == prompt
    assert len(ours["tokens"]) == NUM_TOKENS
    errors_N = np.abs(logits32[len(prompt) - 1 : -1] - logits64).max(axis=-1)
    runner_up_N, best_N = np.sort(logits64, axis=-1)[:, -2:].T
    for n, (mine, theirs) in enumerate(zip(ours["tokens"], tokens, strict=True)):
        if best_N[n] - runner_up_N[n] <= 2 * FACTOR * errors_N[n]:
            pytest.skip(f"token {n} is undecidable: its lead is {best_N[n] - runner_up_N[n]:.3g}")
        assert mine == theirs, f"token {n}"


def test_weights_and_tokenizer_are_those_that_transformers_reads(
    answer: tuple[list[int], list[int], np.ndarray], logits32: np.ndarray
) -> None:
    """An oracle with its own reader of the file: the same prompt tokens, logits and greedy tokens.

    Ours in float64 against its, which computes rope's angles in float32: within float32's noise.
    """
    prompt, tokens, logits64 = answer
    assert prompt == GOLDEN["prompt_tokens"]
    assert tokens == GOLDEN["tokens"][:NUM_TOKENS]
    tolerance = FACTOR * np.abs(logits32[len(prompt) - 1] - logits64[0]).max()
    for token, expected in GOLDEN["logits"].items():
        assert abs(logits64[0, int(token)] - expected) <= tolerance, token
    assert abs(np.linalg.norm(logits64[0]) - GOLDEN["logits_norm"]) <= tolerance * np.sqrt(logits64.shape[1])


def test_the_prompt_is_rendered_by_the_models_own_template(tokenizer: ChatTokenizer) -> None:
    """With the system prompt that the template adds."""
    rendered = tokenizer.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert rendered == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_digits_are_split_one_by_one(tokenizer: ChatTokenizer) -> None:
    """The published tokenizer's rule, which a plain GPT-2 tokenizer lacks."""
    tokens = tokenizer.encode("2025 and 1999")
    texts = [tokenizer.decode([token]) for token in tokens]
    assert texts == ["2", "0", "2", "5", " and", " ", "1", "9", "9", "9"]


def test_text_survives_encoding_and_decoding(tokenizer: ChatTokenizer) -> None:
    for text in ("Yaound\u00e9, N'Djam\u00e9na; 3.14\n\n\ttabs", "\u65e5\u672c \U0001f600 e\u0301"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_tokens_are_one_token_each(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.encode("<|im_start|>") == [1]
    assert tokenizer.encode("<|im_end|>") == [2] == [tokenizer.eos_id]
