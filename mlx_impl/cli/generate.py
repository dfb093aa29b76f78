"""`generate`: the answer to a prompt, shown as it comes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable

from ..config import require_seed
from .settings import flags
from .settings.flags import add_json_flag, folder, number, require_at_least

HELP = "the answer to a prompt"
FROM_STANDARD_INPUT = "-"


def add_flags(command: argparse.ArgumentParser) -> None:
    model = command.add_argument_group("model")
    flags.add_model_flags(model)
    flags.add_dtype_flag(model)
    group = command.add_argument_group("generation")
    folder(group, "--adapter-path", "with this adapter (default: none)")
    group.add_argument(
        "--prompt", required=True, metavar="TEXT", help="what the user says; - reads it from standard input"
    )
    group.add_argument(
        "--system", metavar="TEXT", help="what the model is told before it (default: what its template says)"
    )
    number(group, "--max-tokens", 100, "of the answer")
    number(group, "--temperature", 0.0, "0 takes the most likely token, 1 draws from the model")
    number(group, "--top-p", 1.0, "draw from the likeliest tokens that together have this probability")
    number(group, "--seed", 0, "of the draw")
    add_json_flag(group)


def run(args: argparse.Namespace) -> None:
    import mlx.core as mx

    from ..files.adapters import load_with_adapter
    from ..files.precision import to_dtype
    from ..generate import generate
    from ..run.memory_check import require_answers
    from ..run.sampling import Sampling
    from ..text.streaming import stream_text
    from .screen.console import make_console, working

    require_at_least(1, "max_tokens", args.max_tokens)
    require_seed("seed", args.seed)
    to_dtype(args.dtype)
    sampling = Sampling(args.temperature, args.top_p)
    prompt = read_prompt() if args.prompt == FROM_STANDARD_INPUT else args.prompt
    said = messages(args.system, prompt)
    console = make_console(stderr=True)
    with working("reading the model", console):
        loaded = load_with_adapter(args.model, args.adapter_path, args.dequantize, args.dtype)
    tokenizer = loaded.tokenizer
    prompt_tokens = tokenizer.encode_prompt(said)
    for remark in require_answers(loaded.model, [prompt_tokens], args.max_tokens):
        console.print(remark)
    mx.random.seed(args.seed)
    answer = generate(loaded.model, prompt_tokens, args.max_tokens, tokenizer.stop_ids, sampling)
    if not args.json:
        show(stream_text(answer, tokenizer.decode))
        return
    tokens = list(answer)
    result = {
        "prompt": prompt,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "text": tokenizer.decode(tokens),
        "finish_reason": "length" if len(tokens) == args.max_tokens else "stop",
    }
    print(json.dumps(result))


def read_prompt() -> str:
    """Standard input as UTF-8, whatever the locale, without the end of its last line."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig") if sys.stdin else ""
    except UnicodeDecodeError:
        raise ValueError("--prompt - must read UTF-8 text from standard input") from None
    if not text.strip():
        raise ValueError("--prompt - must read a text from standard input, and there is none")
    return text.removesuffix("\n").removesuffix("\r")


def messages(system: str | None, prompt: str) -> list[dict[str, str]]:
    from ..text.rows import is_text

    said = {"system": system, "user": prompt}
    for role, flag in (("system", "--system"), ("user", "--prompt")):
        if said[role] is not None and not is_text(said[role]):
            raise ValueError(f"{flag} must be UTF-8 text")
    return [{"role": role, "content": text} for role, text in said.items() if text is not None]


def show(parts: Iterable[str]) -> None:
    """Each at once, control characters only into files; also what Ctrl-C cuts short ends its line."""
    from .screen.console import harmless

    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    try:
        for part in parts:
            print(harmless(part) if is_terminal else part, end="", flush=True)
    finally:
        print(flush=True)
