"""`generate`: the answer to a prompt."""

from __future__ import annotations

import argparse
import json
import math

from ..config import require_seed
from . import flags
from .flags import add_json_flag, folder, number, require_at_least

HELP = "the answer to a prompt"


def add_flags(command: argparse.ArgumentParser) -> None:
    flags.add_model_flags(command.add_argument_group("model"))
    group = command.add_argument_group("generation")
    folder(group, "--adapter-path", "with this adapter (default: none)")
    group.add_argument("--prompt", required=True, metavar="TEXT", help="what the user says")
    number(group, "--max-tokens", 100, "of the answer")
    number(group, "--temperature", 0.0, "0 takes the most likely token, 1 draws from the model")
    number(group, "--seed", 0, "of the draw")
    add_json_flag(group)


def run(args: argparse.Namespace) -> None:
    import mlx.core as mx

    from ..adapters import load_with_adapter
    from ..data import is_text
    from ..generate import generate

    require_at_least(1, "max_tokens", args.max_tokens)
    require_seed("seed", args.seed)
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature must be finite and at least 0, got {args.temperature}")
    loaded = load_with_adapter(args.model, args.adapter_path, args.dequantize)
    tokenizer = loaded.tokenizer
    if not is_text(args.prompt):
        raise ValueError("--prompt must be UTF-8 text")
    prompt_tokens = tokenizer.encode_prompt([{"role": "user", "content": args.prompt}])
    mx.random.seed(args.seed)
    tokens = list(generate(loaded.model, prompt_tokens, args.max_tokens, tokenizer.eos_id, args.temperature))
    result = {
        "prompt": args.prompt,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "text": tokenizer.decode(tokens),
        "finish_reason": "length" if len(tokens) == args.max_tokens else "stop",
    }
    print(json.dumps(result) if args.json else result["text"])
