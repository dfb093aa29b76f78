"""What is known to differ in TRL 1.16.0's SFTTrainer on transformers 5.23.0: facts, some documented choices.

What follows from PEFT or from torch's attention has PEFT's program; reproductions/trl_*.py show the rest.
"""

from __future__ import annotations

from tests.peers.adapters.peft_departures import DORA, EXPRESSION, NAMES, NAN_QUERY

MEANS = "an evaluation is the mean of the batches' means (transformers' Trainer)"
LEFT_OUT = "an evaluation leaves out the batches whose loss is NaN or infinite (transformers' Trainer)"
REPORTED = "a loss that is NaN or infinite is reported as 0, or as the mean so far (transformers' Trainer)"
NO_TARGETS = "a batch without targets has the loss 0, in an evaluation as in an update"
LOSS, EXTREME_LOSS = "test_05_loss.py::test_the_loss_over_a_data_set_", "test_05_loss_extremes.py::test_"
STEP, WINDOW = "test_08_step_extremes.py::test_", "test_10_equivalences_extremes.py::test_"
# (rung, claim, what TRL does)
DEPARTURES = (
    (2, f"{NAMES}[an expression]", EXPRESSION),
    (
        15,
        "test_15_options.py::test_an_option_changes_the_results_and_gives_the_references"
        "[LoRAConfig.target_modules: an expression for the whole name]",
        EXPRESSION,
    ),
    (
        4,
        "test_04_forward_extremes.py::test_a_number_that_ends_reaches_the_logits[a weight of a query-nan]",
        NAN_QUERY,
    ),
    (5, f"{LOSS}weighs_every_target_alike", MEANS),
    (5, f"{LOSS}does_not_depend_on_the_batch_size", MEANS),
    (5, f"{EXTREME_LOSS}an_evaluation_without_targets_is_no_number", NO_TARGETS),
    (5, f"{EXTREME_LOSS}a_batch_without_targets_does_not_change_an_evaluation", NO_TARGETS),
    *(
        (8, f"{STEP}an_update_without_targets_is_refused_or_no_number[{x}]", NO_TARGETS)
        for x in ("sgd", "adamw")
    ),
    (5, f"{EXTREME_LOSS}a_nan_in_one_batch_reaches_the_evaluation", LEFT_OUT),
    *(
        (8, f"{STEP}a_loss_that_ends_is_reported_or_refused[{x}]", REPORTED)
        for x in ("nan-free", "nan-clipped", "infinity-free", "infinity-clipped")
    ),
    (8, f"{STEP}the_second_update_after_a_ruined_one_is_no_number", REPORTED),
    *(
        (10, f"{WINDOW}a_nan_in_a_micro_batch_reaches_the_update[{place}-{way}]", REPORTED)
        for place in (0, 1, 2)
        for way in ("train", "train_checkpointed")
    ),
    (10, "test_10_equivalences.py::test_dropout_with_given_masks_equals_the_reference[dora]", DORA),
)
SHOWN_BY = {
    EXPRESSION: "peft_expression",
    NAN_QUERY: "peft_nan_query",
    MEANS: "trl_evaluation",
    NO_TARGETS: "trl_no_targets",
    LEFT_OUT: "trl_evaluation_not_finite",
    REPORTED: "trl_not_finite",
    DORA: "peft_dora_dropout",
}
