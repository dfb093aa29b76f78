"""What a trainer may offer beyond the required members: the rung that asks for it, and its form."""

from __future__ import annotations

REQUIRED = ("dialect", "logits", "loss", "gradients", "train", "factors", "base")
CAPABILITIES: dict[str, tuple[int, str]] = {
    "ops": (1, "a namespace of MLX functions, those of mlx_impl/ops.py"),
    "micro_batches": (3, "(examples, training) -> the micro-batches of each update that `fit` trains on"),
    "read_examples": (3, "(tokenizer's folder, .jsonl file, targets, max_tokens) -> examples"),
    "hidden_states": (4, "(tokens_BT) -> the output of embedding, blocks and norm, by module name"),
    "exact": (4, "a class-level context manager: trainers built inside it compute in float64 throughout"),
    "loss_of_logits": (5, "(logits_BTV, batch) -> (nats, num_targets): the loss alone"),
    "evaluate": (5, "(batches) -> nats per target over all of them"),
    "pullback": (6, "(batch, cotangent_BTV) -> the factors' gradients of <logits, cotangent>"),
    "optimizer_names": (7, "(training) -> names of all parameters for which the optimizer holds state"),
    "apply_gradients": (8, "(gradients of each update, training): schedule and optimizer alone, no clipping"),
    "learning_rates": (
        8,
        "(training) -> the learning rate of every update, by the schedule function; do not train",
    ),
    "start_at": (8, "(update): the next run begins as if so many updates had been done, its moments still 0"),
    "token_counts": (8, "(windows, training) -> the number of input tokens that every update reports"),
    "gradient_norms": (8, "(windows, training) -> the global norm of every update, before clipping"),
    "train_on_ranks": (
        9,
        "(windows, training, num_ranks) -> losses and factors of each of so many processes",
    ),
    "initial_factors_on_ranks": (
        9,
        "(seed, num_ranks) -> what each of so many processes makes for itself when it is given none",
    ),
    "train_compiled": (10, "as train, compiled; the same seed gives the same dropout masks"),
    "train_checkpointed": (10, "as train, with activations recomputed in the backward pass"),
    "set_dropout_masks": (
        10,
        "({name of the linear: keep_BTI}): used instead of random ones, in every update",
    ),
    "fit": (12, "(examples, training, num_updates, validation, folder) -> (losses, validation losses)"),
    "save": (12, "(folder): writes the whole training state, after `train`"),
    "load": (12, "(folder): restores that state in a new trainer; the next `train` continues the run"),
    "save_on_ranks": (
        12,
        "(windows, training, folders) -> each process trains, saves into its own, and lists the first",
    ),
    "validation_losses": (12, "() -> those of the whole run so far, by the number of updates done"),
    "require_same_run": (
        12,
        "(folder, examples, training): refuses to resume another run than the saved one",
    ),
    "each_update": (12, "(iterator of windows, training) -> iterator of losses: each update when asked for"),
    "set_factors": (
        12,
        "(factors): puts these in; the next `train` or `fit` continues the same run from them",
    ),
    "dropout_is_on": (14, "() -> whether the model drops inputs now"),
    "initial_factors": (14, "(seed): those that the trainer makes for itself when it is given none"),
    "peak_bytes": (15, "(windows, training) -> the most memory that `train` holds, beyond that held before"),
    "in_bfloat16": (15, "a class-level context manager: trainers built inside have their base in bfloat16"),
    "in_4_bits": (15, "the same, for linears quantized to 4 bits; `base` returns the weights dequantized"),
    "merge": (16, "(): adds the factors into the base; `base` then returns the merged weights"),
    "unmerge": (16, "(): restores base and factors"),
    "save_adapter": (17, "(folder): writes PEFT's adapter_config.json and adapter_model.safetensors"),
    "load_adapter": (17, "(folder): puts PEFT's adapter in these files into a trainer that has none"),
    "save_mlx_lm": (17, "(folder): writes mlx-lm's adapter_config.json and adapters.safetensors"),
    "load_mlx_lm": (17, "(folder): puts mlx-lm's adapter in these files into a trainer that has none"),
    "greedy": (19, "(prompt, num_tokens) -> token numbers"),
    "sample": (19, "(logits_V, temperature, top_p, number) -> so many tokens drawn from them"),
    "greedy_all": (19, "(prompts, num_tokens, end) -> token numbers of each prompt, up to its token `end`"),
}
OPTIONAL = {name: rung for name, (rung, _) in CAPABILITIES.items()}
