"""What `lora-ladder --help` says below its options: what can climb, and what an adapter must have."""

from __future__ import annotations

import textwrap

from tests.lora_ladder.capabilities import CAPABILITIES, REQUIRED

WHAT_CAN_CLIMB = """\
What can climb: a trainer of LoRA adapters for decoders like Llama, whose weights it takes by their
Hugging Face names (model.embed_tokens.weight, model.layers.0.self_attn.q_proj.weight, ...,
lm_head.weight): grouped attention, rope, RMSNorm, a gated SiLU. No mixture of experts, no fused q/k/v,
no image or sound. The models are tiny and made by the ladder, so it needs no download, no GPU and no
MLX. Any framework will do: arrays go in and come out as NumPy."""

WHAT_IT_TAKES = """\
An adapter is a class with the members {members}. `lora-ladder init` writes one with each member
explained. All else is optional; what a class lacks, or raises NotImplementedError for, is "not claimed",
never passed."""

DIALECT = """\
Semantics that differ on purpose are declared in `dialect = Dialect(...)`: scale="alpha";
bias_correction=False; pad_targets=n; accumulation="mean of means"; equal="within one rounding", for code
that computes the same twice but adds in another order, where the ladder otherwise compares to the bit."""

WHAT_IT_COSTS = """\
How long: with the small PyTorch reference, `lora-ladder reference --quick` took 112 seconds of CPU time
on one core, and rung 18, which --quick leaves out, 12; a trainer that is slower takes as much longer.
Ctrl-C or SIGTERM ends a climb, and --json and --html are still written."""

EXIT_STATUS = """\
Exit status: 0 no divergence; 1 a divergence or an error in a claim; 2 the trainer or an option cannot be
used; 3 nothing was judged; 130 interrupted."""


def epilog() -> str:
    """Each paragraph filled; each option of a trainer on a line."""
    members = ", ".join(("__init__", *REQUIRED))
    paragraphs = (WHAT_CAN_CLIMB, WHAT_IT_TAKES.format(members=members), DIALECT, WHAT_IT_COSTS)
    options = "\n".join(f"  {name:<19} {rung:>2}  {words}" for name, (rung, words) in CAPABILITIES.items())
    return "\n\n".join(
        (
            *(textwrap.fill(paragraph.replace("\n", " "), 80) for paragraph in paragraphs),
            f"Optional members, the rung that asks for each, and what it is given and returns:\n{options}",
            EXIT_STATUS,
        )
    )
