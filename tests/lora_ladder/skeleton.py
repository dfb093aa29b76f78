"""The adapter that `lora-ladder init` writes: every member, with what it is given and what it must return."""

from __future__ import annotations

import re
from pathlib import Path

from tests.lora_ladder.here import PACKAGE
from tests.lora_ladder.output import OutputError, write_new

SKELETON = '''\
"""An adapter: my trainer on the LoRA ladder. In this folder: lora-ladder {module}:MyTrainer

Arrays go in and come out as NumPy, by the names of Hugging Face's checkpoints:
"model.layers.0.self_attn.q_proj.weight" (outputs, inputs), and the factors of the adapter beside it,
"model.layers.0.self_attn.q_proj.lora_a" (inputs, rank) and ".lora_b" (rank, outputs), with DoRA ".magnitude".
PEFT stores lora_A and lora_B transposed. A member that your trainer has no counterpart for may stay as it is:
NotImplementedError is reported as "not claimed". Import here whatever your trainer patches.
"""

from {package} import Dialect


class MyTrainer:
    # What the trainer does differently on purpose; it is judged by what is declared here.
    # Dialect(scale="alpha")                     the factor on A B is alpha, not alpha / rank
    # Dialect(bias_correction=False)             Adam without it, as mlx.optimizers has it by default
    # Dialect(pad_targets=1)                     a padding position after each row's end counts as a target
    # Dialect(accumulation="mean of means")      each micro-batch weighs the same, however few its targets
    # Dialect(equal="within one rounding")       two ways to compute the same may add in another order
    dialect = Dialect()

    # By whom these are, in a few words for the report: a fault in them may not be the trainer's.
    optimizer_from = "not said"
    schedule_from = "not said"

    def __init__(self, spec, weights, lora, factors):
        """Build a tiny model with these frozen weights, and an adapter with these factors.

        spec: vocab_size, hidden_size, num_hidden_layers, ..., as in Hugging Face's config.json; qkv_bias,
        qk_norm, rope_scaling, sliding_window. Raise NotImplementedError for a switch that you do not have.
        lora: rank, alpha, dropout, target_modules, num_layers, use_rslora, use_dora, rank_pattern,
        alpha_pattern; None, as factors then are, for the model without an adapter.
        target_modules: names ("q_proj"), dotted suffixes of names ("mlp.down_proj"), one string that is an
        expression for whole names, or "all-linear", matched as PEFT does. Raise NotImplementedError for a
        kind that your trainer does not know; one that it overlooks is a divergence at rung 2.
        """
        raise NotImplementedError("MyTrainer is not written yet")

    def logits(self, tokens_BT):
        """The logits, (rows, positions, vocabulary), without dropout. Rows are padded on the right with 0."""
        raise NotImplementedError("logits")

    def loss(self, batch):
        """(sum of the loss in nats over the targets, number of targets), without dropout.

        batch.inputs_BT: tokens; batch.targets_BT: the token after each; batch.mask_BT: whether that token is
        a target; batch.num_tokens: of inputs, without padding; batch.numbers: of the examples;
        batch.segment_BT: None but for packed rows. Raise NotImplementedError if it is not None and your
        trainer packs no rows. From a mean, multiply by the number of targets that the trainer counts.
        """
        raise NotImplementedError("loss")

    def gradients(self, batch):
        """{{name: gradient}} of the mean loss over the targets, for every trained array, without dropout."""
        raise NotImplementedError("gradients")

    def train(self, windows, training):
        """Train, and return the mean loss over the targets of each update, as it was before that update.

        windows: for each optimizer update a list of micro-batches, to be taken in this order and no others;
        there may be fewer than training.iters, the length of the whole run by which a schedule is laid out.
        training: learning_rate, lr_schedule ("constant", "linear", "cosine"), warmup_steps, optimizer
        ("adamw", "sgd"), weight_decay, max_grad_norm (0: no clipping), loraplus_lr_ratio, grad_checkpoint,
        and seed, which must be that of dropout. Pass on all of them, or raise NotImplementedError.

        A trainer that makes its own batches: replace its source of batches for this call, by one that gives
        these windows, and put it back. The tokens of a batch are inputs_BT and the last column of
        targets_BT; whether each is a target is mask_BT, shifted by one, because the first token is none:
            tokens = np.concatenate([batch.inputs_BT, batch.targets_BT[:, -1:]], axis=1)
            is_target = np.pad(batch.mask_BT, ((0, 0), (1, 0)))
        Windows may hold different numbers of micro-batches: raise NotImplementedError if it cannot do that.
        """
        raise NotImplementedError("train")

    def factors(self):
        """{{name: array}} of the trained arrays, as they are now."""
        raise NotImplementedError("factors")

    def base(self):
        """{{name: array}} of the frozen arrays, as they are now."""
        raise NotImplementedError("base")

    # Optional members let the ladder judge more: `lora-ladder --help` lists them. For example:
    #
    # def learning_rates(self, training):
    #     """The learning rate of each of the training.iters updates."""
    #     Compute it from the schedule, do not train: training.iters may be very large (10,000 and more).
    #     Leave it out if your trainer has no schedule function.
'''


def write_skeleton(path: Path) -> None:
    """Raises OutputError if there is something at this path, or if Python could not import it."""
    if not re.fullmatch(r"[A-Za-z_]\w*\.py", path.name):
        raise OutputError(
            f"an adapter must be a module that Python can import, as my_adapter.py, got {path.name}"
        )
    write_new(path, SKELETON.format(module=path.stem, package=PACKAGE))
