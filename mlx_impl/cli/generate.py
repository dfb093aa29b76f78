"""`generate`: the model's answers to one prompt, to those of a file, or in a chat, printed token by token."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import require_seed
from .prompts_file import Prompt, read_prompts
from .settings import flags
from .settings.flags import add_folder, add_json_flag, add_number, require_at_least

if TYPE_CHECKING:
    from rich.console import Console

    from ..text.tokenizer import ChatTokenizer
    from .answerer import Answerer

HELP = "answer a prompt, the prompts of a file, or chat"
FROM_STANDARD_INPUT = "-"


def add_flags(command: argparse.ArgumentParser) -> None:
    model = command.add_argument_group("model")
    flags.add_model_flags(model)
    flags.add_dtype_flag(model)
    flags.add_template_flags(model)
    group = command.add_argument_group("generation")
    add_folder(group, "--adapter-path", "answer with this adapter (default: none)")
    add_prompt_flags(group)
    add_number(group, "--max-tokens", 100, "longest answer, in tokens")
    add_number(group, "--temperature", 0.0, "sampling temperature; 0 always takes the most likely token")
    add_number(
        group,
        "--top-p",
        1.0,
        "nucleus sampling: draw from the likeliest tokens that make up this probability",
    )
    add_number(group, "--seed", 0, "seed of the sampling")
    add_json_flag(group)


def add_prompt_flags(group: Any) -> None:
    asked = group.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "--prompt", metavar="TEXT", help="the user's message; - reads it from standard input (default: none)"
    )
    asked.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="answer each line of a text file, or each row of a .jsonl file (a text, a prompt or messages) "
        "(default: none)",
    )
    asked.add_argument(
        "--chat",
        action="store_true",
        help="chat at the terminal; /reset forgets the history, /quit ends (default: no)",
    )
    group.add_argument(
        "--system",
        metavar="TEXT",
        help="the system prompt (default: the one in the model's chat template, if any)",
    )


def run(args: argparse.Namespace) -> None:
    import mlx.core as mx

    from ..files.adapters import load_with_adapter
    from ..files.precision import to_dtype
    from ..run.sampling import Sampling
    from .answerer import Answerer
    from .screen.console import make_console, show_status

    require_at_least(1, "max_tokens", args.max_tokens)
    require_seed("seed", args.seed)
    to_dtype(args.dtype)
    template = flags.template_of(args)
    sampling = Sampling(args.temperature, args.top_p)
    if args.chat and args.json:
        raise ValueError("--chat prints a conversation, and --json one object: give only one of them")
    prompts = prompts_of(args)
    for prompt in prompts:
        messages(args.system, prompt)  # raises for what is no text, before the model is read
    console = make_console(stderr=True)
    with show_status("reading the model", console):
        loaded = load_with_adapter(args.model, args.adapter_path, args.dequantize, args.dtype, template)
    answerer = Answerer(loaded, args.max_tokens, sampling, console)
    mx.random.seed(args.seed)
    if args.chat:
        chat_with(answerer, args.system, console)
    elif args.json:
        print(json.dumps(result_of(answerer, args, prompts, console)))
    else:
        answer_each(answerer, args.system, prompts)


def prompts_of(args: argparse.Namespace) -> list[Prompt]:
    if args.chat:
        return [""]  # of which only --system is checked
    if args.prompts is not None:
        return read_prompts(args.prompts)
    return [read_prompt() if args.prompt == FROM_STANDARD_INPUT else args.prompt]


def read_prompt() -> str:
    """Standard input, decoded as UTF-8 whatever the locale, without its final line break."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig") if sys.stdin else ""
    except UnicodeDecodeError:
        raise ValueError("--prompt - reads standard input, which must be UTF-8 text") from None
    if not text.strip():
        raise ValueError("--prompt - reads standard input, which must hold text, got none")
    return text.removesuffix("\n").removesuffix("\r")


def encode_prompt(tokenizer: ChatTokenizer, system: str | None, prompt: Prompt) -> list[int]:
    """The prompt through the chat template; as it is for a model without one, which goes on with it."""
    if tokenizer.template is None and system is None and isinstance(prompt, str):
        return tokenizer.encode_start(prompt)
    return tokenizer.encode_prompt(messages(system, prompt))


def messages(system: str | None, prompt: Prompt) -> list[dict[str, Any]]:
    from ..text.conversation import is_text

    for text, flag in ((system, "--system"), (prompt, "--prompt")):
        if text is not None and not isinstance(text, list) and not is_text(text):
            raise ValueError(f"{flag} must be UTF-8 text")
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, *(prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}])]


def answer_each(answerer: Answerer, system: str | None, prompts: list[Prompt]) -> None:
    """Print the answers as they come; several of them below their prompts."""
    from .screen.console import printable

    for number, prompt in enumerate(prompts):
        tokens = encode_prompt(answerer.tokenizer, system, prompt)
        if len(prompts) > 1:
            shown = prompt if isinstance(prompt, str) else prompt[-1].get("content") or ""
            print(f"\n> {printable(shown)}" if number else f"> {printable(shown)}")
        print_stream(answerer.stream(tokens))
        answerer.tell_if_cut()


def chat_with(answerer: Answerer, system: str | None, console: Console) -> None:
    from .chat import chat, is_ctrl_c
    from .signals import StoppedBySignal

    answerer.tokenizer.require_template()

    def reply_to(history: list[dict[str, Any]]) -> str:
        parts: list[str] = []
        stream = answerer.stream(answerer.tokenizer.encode_prompt(history))
        try:
            print_stream(kept(stream, parts))
        except StoppedBySignal as stop:
            if not is_ctrl_c(stop):
                raise
        else:
            answerer.tell_if_cut()
        return "".join(parts)

    chat(system, reply_to, console)


def kept(stream: Iterable[str], parts: list[str]) -> Iterable[str]:
    """The same parts, each added to the list too."""
    for part in stream:
        parts.append(part)
        yield part


def result_of(
    answerer: Answerer, args: argparse.Namespace, prompts: list[Prompt], console: Console
) -> dict[str, Any]:
    """What --json prints: the answer to --prompt, or {"answers": [...]} for --prompts."""
    from .screen.console import show_progress

    results = []
    for prompt in show_progress(prompts, len(prompts), "answering", console):
        tokens = encode_prompt(answerer.tokenizer, args.system, prompt)
        results.append({"prompt": prompt, "prompt_tokens": tokens, **answerer.whole(tokens)})
    return results[0] if args.prompts is None else {"answers": results}


def print_stream(parts: Iterable[str]) -> None:
    """Print each part as it comes. On a terminal control characters are replaced."""
    from .screen.console import printable

    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    try:
        for part in parts:
            print(printable(part) if is_terminal else part, end="", flush=True)
    finally:  # Ctrl-C ends the line too
        print(flush=True)
