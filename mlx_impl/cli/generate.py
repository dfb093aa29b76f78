"""`generate`: the model's answer to a prompt, printed token by token."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..config import require_seed
from .settings import flags
from .settings.flags import add_folder, add_json_flag, add_number, require_at_least

if TYPE_CHECKING:
    from ..text.tokenizer import ChatTokenizer

HELP = "answer a prompt"
FROM_STANDARD_INPUT = "-"


def add_flags(command: argparse.ArgumentParser) -> None:
    model = command.add_argument_group("model")
    flags.add_model_flags(model)
    flags.add_dtype_flag(model)
    flags.add_template_flags(model)
    group = command.add_argument_group("generation")
    add_folder(group, "--adapter-path", "answer with this adapter (default: none)")
    group.add_argument(
        "--prompt", required=True, metavar="TEXT", help="the user's message; - reads it from standard input"
    )
    group.add_argument(
        "--system",
        metavar="TEXT",
        help="the system prompt (default: the one in the model's chat template, if any)",
    )
    add_number(group, "--max-tokens", 100, "longest answer, in tokens")
    add_number(group, "--temperature", 0.0, "sampling temperature; 0 always takes the most likely token")
    add_number(group, "--top-p", 1.0, "nucleus sampling: the probability that the sampled tokens cover")
    add_number(group, "--seed", 0, "seed of the sampling")
    add_json_flag(group)


def run(args: argparse.Namespace) -> None:
    import mlx.core as mx

    from ..fast.packed_modules import unpacking_first
    from ..files.adapters import load_with_adapter
    from ..files.precision import to_dtype
    from ..generate import generate
    from ..run.memory_check import require_generation_memory
    from ..run.sampling import Sampling
    from ..text.streaming import stream_text
    from .screen.console import make_console, show_status

    require_at_least(1, "max_tokens", args.max_tokens)
    require_seed("seed", args.seed)
    to_dtype(args.dtype)
    template = flags.template_of(args)
    sampling = Sampling(args.temperature, args.top_p)
    prompt = read_prompt() if args.prompt == FROM_STANDARD_INPUT else args.prompt
    messages(args.system, prompt)  # raises for what is no text, before the model is read
    console = make_console(stderr=True)
    with show_status("reading the model", console):
        loaded = load_with_adapter(args.model, args.adapter_path, args.dequantize, args.dtype, template)
    tokenizer = loaded.tokenizer
    prompt_tokens = encode_prompt(tokenizer, args.system, prompt)
    for remark in require_generation_memory(loaded.model, [prompt_tokens], args.max_tokens):
        console.print(remark)
    mx.random.seed(args.seed)
    answer = generate(loaded.model, prompt_tokens, args.max_tokens, tokenizer.stop_ids, sampling)
    with unpacking_first(loaded.model):
        if not args.json:
            print_stream(stream_text(answer, tokenizer.decode))
            return
        tokens = list(answer)
    reason = "length" if len(tokens) == args.max_tokens else "stop"
    result = {"prompt": prompt, "prompt_tokens": prompt_tokens, "tokens": tokens}
    print(json.dumps({**result, "text": tokenizer.decode(tokens), "finish_reason": reason}))


def read_prompt() -> str:
    """Standard input, decoded as UTF-8 whatever the locale, without its final line break."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig") if sys.stdin else ""
    except UnicodeDecodeError:
        raise ValueError("--prompt - reads standard input, which must be UTF-8 text") from None
    if not text.strip():
        raise ValueError("--prompt - reads standard input, which must hold text, got none")
    return text.removesuffix("\n").removesuffix("\r")


def encode_prompt(tokenizer: ChatTokenizer, system: str | None, prompt: str) -> list[int]:
    """The prompt through the chat template; as it is for a model without one, which goes on with it."""
    if tokenizer.template is None and system is None:
        return tokenizer.encode_start(prompt)
    return tokenizer.encode_prompt(messages(system, prompt))


def messages(system: str | None, prompt: str) -> list[dict[str, str]]:
    from ..text.conversation import is_text

    texts = {"system": system, "user": prompt}
    for role, flag in (("system", "--system"), ("user", "--prompt")):
        if texts[role] is not None and not is_text(texts[role]):
            raise ValueError(f"{flag} must be UTF-8 text")
    return [{"role": role, "content": text} for role, text in texts.items() if text is not None]


def print_stream(parts: Iterable[str]) -> None:
    """Print each part as it comes. On a terminal control characters are replaced."""
    from .screen.console import printable

    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    try:
        for part in parts:
            print(printable(part) if is_terminal else part, end="", flush=True)
    finally:  # Ctrl-C ends the line too
        print(flush=True)
