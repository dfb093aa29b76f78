"""What is known to differ in PEFT 0.21.2 on transformers 5.23.0: facts, some of them documented choices.

reproductions/peft_*.py show most of them alone.
"""

from __future__ import annotations

UNMERGED, ANSWERS = (
    "unmerging subtracts, so that the base weights come back rounded",
    "tokens are generated from logits that are NaN or infinite",
)
DORA = "DoRA's dropout acts on the input of the frozen weight too"
EXPRESSION = "an expression that matches a module which is no linear layer is refused"
ORDER = "patterns are saved sorted, and the first that fits decides: a rank or scale may change"
LOADED = "a file that lacks factors, or has others, is loaded with a warning"
NAN_QUERY = "a query that is NaN gets numbers: torch's attention on a CPU gives 0 for it"
EMPTY = "the loss of a batch without targets is 0 / 0 (transformers)"
NAMES = "test_02_layer_names.py::test_of_twelve_layers_those_that_are_named_are_adapted"
NOT_FINITE = "test_19_generation_extremes.py::test_a_model_whose_logits_are_not_finite_gives_no_answer"
MERGE = "test_16_merge.py::test_"
FILES = "test_17_files.py::test_"
ADAPTERS = (
    "lora",
    "rslora",
    "dora",
    "patterns",
    "some",
    "regex",
    "all-linear",
    "last layer",
    "dora with bias",
)
# (rung, claim, what PEFT does): what fails on the ladder, each a fact of the versions above.
DEPARTURES = (
    (
        2,
        f"{NAMES}[an expression]",
        EXPRESSION,
    ),
    (
        4,
        "test_04_forward_extremes.py::test_a_number_that_ends_reaches_the_logits[a weight of a query-nan]",
        NAN_QUERY,
    ),
    (5, "test_05_loss_extremes.py::test_a_batch_without_targets_has_no_nats_and_no_targets", EMPTY),
    (10, "test_10_equivalences.py::test_dropout_with_given_masks_equals_the_reference[dora]", DORA),
    (
        15,
        "test_15_options.py::test_an_option_changes_the_results_and_gives_the_references"
        "[LoRAConfig.target_modules: an expression for the whole name]",
        EXPRESSION,
    ),
    *(
        (16, f"{MERGE}{claim}[{adapter}]", UNMERGED)
        for claim in (
            "unmerging_restores_every_byte",
            "after_unmerging_training_goes_on",
            "a_second_merge_is_that_of_the_factors_at_that_time",
        )
        for adapter in ADAPTERS
    ),
    *(
        (17, f"{FILES}{claim}[{adapter}]", ORDER)
        for claim in (
            "pefts_rules_give_every_linear_its_rank_and_scale",
            "the_reference_with_what_the_files_say_has_the_logits",
            "what_is_saved_loaded_and_saved_again_is_the_same",
        )
        for adapter in ("patterns", "patterns of rslora and dora")
    ),
    *(
        (17, f"{FILES}files_that_do_not_fit_are_refused[{kind}]", LOADED)
        for kind in ("without_a_b", "without_a_magnitude", "under_another_name", "of_more_linears")
    ),
    *(
        (
            19,
            f"{NOT_FINITE}[{x}]",
            ANSWERS,
        )
        for x in ("nan", "infinity")
    ),
)
SHOWN_BY = {
    EXPRESSION: "peft_expression",
    NAN_QUERY: "peft_nan_query",
    EMPTY: "peft_no_targets",
    DORA: "peft_dora_dropout",
    UNMERGED: "peft_unmerge",
    ORDER: "peft_pattern_order",
    LOADED: "peft_missing_factors",
    ANSWERS: "peft_not_finite",
}
