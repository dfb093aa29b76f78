"""What is known to differ, of each peer, in the version that `tox -e peers` installs.

Facts, not accusations: some are documented choices. test_departures.py and `python -m tests.peers.departures`
hold each peer to its entry, both ways.
"""

from __future__ import annotations

from tests.peers.adapters import peft_departures as of_peft
from tests.peers.adapters import trl_departures as of_trl
from tests.peers.departure import Departure, Peer, grouped

STEP, TRAJECTORY = "test_08_step.py::test_", "test_09_trajectory.py::test_"
EQUAL, MIXED = (
    "test_10_equivalences.py::test_",
    "test_13_combinations.py::test_a_combination_trains_as_the_reference",
)
RATE, LAST_RATE = (
    f"{STEP}the_learning_rate_of_every_update_is_the_closed_form",
    f"{STEP}the_last_learning_rate_of_a_long_run_is_the_closed_form",
)
NOT_FINITE = "test_19_generation_extremes.py::test_a_model_whose_logits_are_not_finite_gives_no_answer"


def combinations(*numbers: int) -> tuple[str, ...]:
    return tuple(f"{MIXED}[{number}]" for number in numbers)


MASKS = "dropout masks are drawn anew when a checkpointed block is recomputed"
MEAN_OF_MEANS = "accumulation takes the mean of the micro-batches' means, whatever their numbers of targets"
PAD = "the pad token after each row's end counts as a target"
LAST_WINDOW = "an incomplete last window of micro-batches is not trained on"
ADAM = "AdamW corrects no bias by default: the first update is 3.16 learning rates"
WARMUP = "after a warmup the peak lasts two updates, and the decay ends one update late"
FLOAT32_RATE = "the learning rate is computed in float32, which loses digits at the end of a long run"
NAN_TOKENS = "tokens are generated from logits that are NaN or infinite"
REPLACEMENT = "rows are drawn with replacement: each step takes the first batch of a new iterator"
SAME_ROWS = "every rank gets the same rows, and the others are never trained on"
RANKS = "the ranks' means are averaged, whatever their numbers of targets"
LAST_BATCH = "the examples of an incomplete last batch are not trained on"
NAN_LOGIT = "a logit that is NaN or infinite where there is no target makes the loss NaN: it is taken times 0"
STOPS = "a micro-batch without targets, beside others that have some, stops the run with an error"
MAGNITUDE = "LoRA+ gives DoRA's magnitude the learning rate of A; PEFT gives it that of B"

NAN_LOGIT_CLAIMS = tuple(
    f"test_05_loss_extremes.py::test_a_logit_that_ends_at_no_target_does_not_matter[{number}]"
    for number in ("nan", "inf")
)
STOPS_CLAIMS = tuple(
    f"test_10_equivalences_extremes.py::test_a_micro_batch_without_targets_adds_nothing_to_an_update[{place}]"
    for place in range(3)
)
MASK_CLAIMS = (
    f"{EQUAL}the_backward_pass_uses_the_dropout_masks_of_the_forward_pass[train_checkpointed]",
    "test_14_randomness.py::test_the_seed_decides_the_masks_whatever_the_way[checkpointed]",
)
WARMUP_CLAIMS = (
    f"{RATE}[linear-3]",
    f"{RATE}[cosine-3]",
    f"{LAST_RATE}[linear-3]",
    f"{LAST_RATE}[cosine-3]",
    f"{STEP}given_gradients_move_the_factors_as_in_the_reference[5-linear]",
    *(f"{STEP}a_run_warms_up_and_takes_the_rates_of_its_schedule[{kind}]" for kind in ("linear", "cosine")),
    f"{TRAJECTORY}the_schedule_reaches_the_optimizer",
    *combinations(1, 2, 5, 6, 7, 8, 9, 11, 12, 13, 14),
)
LAST_WINDOW_CLAIMS = (
    f"{EQUAL}updates_with_gradient_accumulation_equal_the_reference[sgd]",
    f"{EQUAL}updates_with_gradient_accumulation_equal_the_reference[adamw]",
    f"{EQUAL}the_schedule_counts_updates_and_not_micro_batches",
)
FLOAT32_CLAIMS = (f"{LAST_RATE}[cosine-0]", f"{LAST_RATE}[linear-0]")
PAD_CLAIMS = ("test_05_loss.py::test_the_loss_equals_the_reference[untied]",)
ADAM_CLAIMS = (f"{STEP}given_gradients_move_the_factors_as_in_the_reference[1-adamw]",)
MEAN_CLAIMS = combinations(4)  # two micro-batches of unequal numbers of targets

MLX_LM = Peer(
    "mlx-lm",
    "0.32.2",
    "tests.peers.adapters.mlx_lm:MlxLmTrainer",
    (
        Departure(PAD, PAD_CLAIMS, "mlx_lm_pad_target", declared="pad_targets"),
        Departure(MEAN_OF_MEANS, MEAN_CLAIMS, "mlx_lm_mean_of_means", declared="accumulation"),
        Departure(ADAM, ADAM_CLAIMS, "mlx_lm_adam_bias", declared="bias_correction"),
        Departure(WARMUP, WARMUP_CLAIMS, "mlx_lm_warmup"),
        Departure(FLOAT32_RATE, FLOAT32_CLAIMS, "mlx_lm_float32_schedule"),
        Departure(LAST_WINDOW, LAST_WINDOW_CLAIMS, "mlx_lm_last_window"),
        Departure(MASKS, MASK_CLAIMS, "mlx_lm_checkpointed_dropout"),
        Departure(NAN_TOKENS, (f"{NOT_FINITE}[nan]", f"{NOT_FINITE}[infinity]"), "mlx_lm_not_finite"),
        Departure(LAST_BATCH, (), "mlx_lm_last_batch"),
        Departure(RANKS, (), "mlx_lm_ranks"),
    ),
)

# Built on mlx-lm: its model, LoRA layers and schedule, with a loss, loop and checkpointing of its own.
MLX_LM_LORA = Peer(
    "mlx-lm-lora",
    "5.10.2",
    "tests.peers.adapters.mlx_lm_lora:MlxLmLoraTrainer",
    (
        Departure(PAD, PAD_CLAIMS, "mlx_lm_lora_pad_target", declared="pad_targets"),
        Departure(MEAN_OF_MEANS, MEAN_CLAIMS, "mlx_lm_lora_mean_of_means", declared="accumulation"),
        Departure(ADAM, ADAM_CLAIMS, "mlx_lm_adam_bias", declared="bias_correction"),
        Departure(WARMUP, WARMUP_CLAIMS, "mlx_lm_warmup"),
        Departure(FLOAT32_RATE, FLOAT32_CLAIMS, "mlx_lm_float32_schedule"),
        Departure(LAST_WINDOW, LAST_WINDOW_CLAIMS, "mlx_lm_lora_last_window"),
        Departure(MASKS, MASK_CLAIMS, "mlx_lm_lora_checkpointed_dropout"),
        Departure(REPLACEMENT, (), "mlx_lm_lora_replacement"),
        Departure(SAME_ROWS, (), "mlx_lm_lora_ranks"),
    ),
    built_on=(MLX_LM,),
)

MLX_VLM = Peer(
    "mlx-vlm",
    "0.7.10",
    "tests.peers.adapters.mlx_vlm:MlxVlmTrainer",
    (
        Departure(MEAN_OF_MEANS, MEAN_CLAIMS, "mlx_vlm_mean_of_means", declared="accumulation"),
        Departure(ADAM, ADAM_CLAIMS, "mlx_vlm_adam_bias", declared="bias_correction"),
        Departure(MASKS, MASK_CLAIMS, "mlx_vlm_checkpointed_dropout"),
        Departure(LAST_BATCH, (), "mlx_vlm_last_batch"),
    ),
)

UNSLOTH = Peer(
    "unsloth-zoo",
    "2026.10.9",
    "tests.peers.adapters.unsloth_zoo:UnslothTrainer",
    (
        Departure(MASKS, MASK_CLAIMS, "unsloth_zoo_checkpointed_dropout"),
        Departure(NAN_LOGIT, NAN_LOGIT_CLAIMS, "unsloth_zoo_nan_logit"),
        Departure(STOPS, STOPS_CLAIMS, "unsloth_zoo_no_targets"),
        Departure(MAGNITUDE, combinations(0), "unsloth_zoo_loraplus_dora"),
    ),
)

PEFT = Peer(
    "peft", "0.21.2", "tests.peers.adapters.peft:PeftTrainer", grouped(of_peft.DEPARTURES, of_peft.SHOWN_BY)
)

# Built on PEFT: its layers are PEFT's, and its files, merging and generation are judged there.
TRL = Peer(
    "trl",
    "1.16.0",
    "tests.peers.adapters.trl:TrlTrainer",
    grouped(of_trl.DEPARTURES, of_trl.SHOWN_BY),
    built_on=(PEFT,),
)

PEERS = (MLX_LM, MLX_LM_LORA, MLX_VLM, UNSLOTH, PEFT, TRL)
