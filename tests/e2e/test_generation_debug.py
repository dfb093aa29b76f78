"""`tox -e generation-debug`: prompts, tokens and answers with and without an adapter, printed."""

from __future__ import annotations

import json

from tests.e2e.conftest import Run, run_module

QUESTION = "What is the capital of Angola?"


def test_the_adapter_changes_what_the_model_answers(short_run: Run) -> None:
    """The same prompt tokens, other answer tokens; both answers end by themselves or at the limit."""
    common = ("mlx_impl", "generate", "--json", "--max-tokens", "24", "--prompt", QUESTION)
    without = json.loads(run_module(*common))
    with_adapter = json.loads(run_module(*common, "--adapter-path", str(short_run.folder)))
    print(f"\nprompt:          {QUESTION}\nprompt tokens:   {without['prompt_tokens']}")
    print(f"without adapter: {without['tokens']}\n                 {without['text']!r}")
    print(f"with adapter:    {with_adapter['tokens']}\n                 {with_adapter['text']!r}")
    assert with_adapter["prompt_tokens"] == without["prompt_tokens"]
    assert with_adapter["tokens"] != without["tokens"]
