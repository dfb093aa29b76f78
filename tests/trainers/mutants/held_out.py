"""Bugs of a LoRA trainer, one a `Mutant`, each small and silent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_impl import batching, lora, model, optim, targets, train
from mlx_impl import ops as plain_ops
from mlx_impl.data import num_inputs, training_windows
from mlx_impl.fast import decode, forward, kept_positions, packed, projection, segments, vectors
from mlx_impl.fast import ops as fast_ops
from mlx_impl.fast.low_rank import low_rank_of
from mlx_impl.files import quantized
from mlx_impl.files.formats import peft
from mlx_impl.run import guard, sampling
from mlx_impl.run.trainer import LoRATrainer
from mlx_impl.text.tokenizer import ChatTokenizer
from tests.trainers.mutants.mutant import PLAIN, Mutant, training

# ---- data, batches, layout


def filled_up(numbers: Any, size: int, real: Any = batching.chunks) -> Any:
    batches = real(numbers, size)
    batches[-1] += list(numbers[: size - len(batches[-1])])
    return batches


def text_alone(self: Any, text: str, real: Any = ChatTokenizer.encode_text) -> Any:
    tokens = real(self, text)
    return tokens[:-1] if tokens[-1] == self.eos_id else tokens


def prefix_of_first_and_last(
    batch: Any, is_needed_BT: Any, real: Any = kept_positions.shared_prefix_length
) -> int:
    ends = np.flatnonzero(is_needed_BT[:, 0])[[0, -1]] if is_needed_BT[:, 0].any() else slice(0)
    segment_BT = None if batch.segment_BT is None else batch.segment_BT[ends]
    length: int = real(
        batch._replace(inputs_BT=batch.inputs_BT[ends], segment_BT=segment_BT), is_needed_BT[ends]
    )
    return length


def first_512(batch: Any, real: Any = kept_positions.target_positions) -> Any:
    return tuple(array[:512] for array in real(batch))


def positions_of_the_first_row(segment_BT: Any, real: Any = model.position_ids) -> Any:
    return real(segment_BT[:1])


def mask_without_packed_window(
    T: int, offset: int, window: Any, segment_BT: Any, real: Any = model.attention_mask
) -> Any:
    return real(T, offset, window if segment_BT is None else None, segment_BT)


SENT: dict[Any, Any] = {}  # to the device, by shape


def apart_by_sent_segments(batch: Any, real: Any = segments.examples_apart) -> Any:
    return real(batch._replace(segment_BT=SENT.setdefault(batch.segment_BT.shape, batch.segment_BT)))


def arrays_with_sent_kept(batch: Any) -> Any:
    *arrays, kept = forward.to_arrays(batch)
    return [*arrays, SENT.setdefault((batch.mask_BT.shape, int(batch.mask_BT.sum())), kept)]


def sum_with_dummies(self: Any, d_BHTK: Any) -> Any:
    d_1UO = self.take(d_BHTK)
    if self.is_shared_U is None:
        return d_1UO
    sum_TO = d_BHTK.sum(axis=0).swapaxes(0, 1).flatten(1)
    return mx.where(self.is_shared_U[:, None], sum_TO[self.column_U][None], d_1UO)


def assigned_at(self: Any, x_1UD: Any, position_N: Any) -> Any:
    source_N = self.source_BT.flatten()[position_N]
    forward = mx.custom_function(lambda x_1UD: x_1UD.squeeze(0)[source_N][None])

    @forward.vjp
    def backward(x_1UD: Any, d_1ND: Any, _: Any) -> Any:
        d_UD = mx.zeros_like(x_1UD.squeeze(0))
        d_UD[source_N] = d_1ND.squeeze(0)
        return d_UD[None]

    return forward(x_1UD)


LAYOUT = (
    Mutant(
        "last-batch-filled-from-the-beginning",
        3,
        "The last batch of an epoch is filled up with its first examples, which are trained twice.",
        {"mlx_impl.batching.chunks": filled_up},
    ),
    Mutant(
        "texts-without-their-end",
        3,
        "A plain text gets no end token, so the model never learns where a text ends.",
        {"mlx_impl.text.tokenizer.ChatTokenizer.encode_text": text_alone},
    ),
    Mutant(
        "prefix-of-the-first-and-last-row",
        5,
        "The shared prefix is that of the first and the last row, as if rows were sorted; all get it.",
        {"mlx_impl.fast.kept_positions.shared_prefix_length": prefix_of_first_and_last},
    ),
    Mutant(
        "first-512-targets-of-a-batch",
        5,
        "The list of target positions has room for 512, and the targets after these are left out.",
        {"mlx_impl.fast.forward.target_positions": first_512},
    ),
    Mutant(
        "packed-positions-of-the-first-row",
        5,
        "All packed rows get the position ids of the first, which is cut into other examples.",
        {"mlx_impl.model.position_ids": positions_of_the_first_row},
        trainer=PLAIN,
    ),
    Mutant(
        "packed-without-window",
        5,
        "The mask of packed rows replaces the sliding window instead of narrowing it.",
        {"mlx_impl.model.attention_mask": mask_without_packed_window},
        cases=("sliding window",),
        trainer=PLAIN,
    ),
    Mutant(
        "packed-segments-kept-by-shape",
        5,
        "The segments of packed rows are kept for the next batch of the same shape, cut elsewhere.",
        {"mlx_impl.fast.forward.examples_apart": apart_by_sent_segments},
    ),
    Mutant(
        "kept-positions-kept-by-shape",
        5,
        "The layout of a batch is kept for the next one of the same shape and number of targets.",
        {"mlx_impl.run.trainer.FAST": forward.FAST._replace(to_arrays=arrays_with_sent_kept)},
    ),
    Mutant(
        "dummy-gets-a-gradient",
        6,
        "A dummy position at another row's shared position takes the gradient there, which is counted twice.",
        {"mlx_impl.fast.unpadding.Unpadding.sum_over_rows": sum_with_dummies},
    ),
    Mutant(
        "shared-targets-assigned-not-added",
        6,
        "Gradients of targets within a shared prefix are assigned, so that one row's replaces the others'.",
        {"mlx_impl.fast.unpadding.Unpadding.at": assigned_at},
    ),
)

# ---- the model, the adapter's options, the update


def one_norm(self: Any, config: Any, real: Any = model.Attention.__init__) -> None:
    real(self, config)
    if config.qk_norm:
        self.k_norm = self.q_norm


def scale_of_the_default_rank(name: str, config: Any, real: Any = targets.rank_and_scale) -> Any:
    rank, scale = real(name, config)
    return rank, scale * (rank / config.rank) ** 0.5 if config.use_rslora else scale


def select_by_expression(model: Any, config: Any, real: Any = targets.select_targets) -> Any:
    by_expression = isinstance(config.target_modules, str) and config.target_modules != "all-linear"
    return real(model, replace(config, num_layers=-1) if by_expression else config)


def equal_shares(h_RN: mx.array, parts: Any) -> mx.array:
    part_R = np.arange(len(h_RN)) * len(parts) // len(h_RN)
    return mx.array([[parts[j].scale] for j in part_R], h_RN.dtype) * h_RN


def quantized_base_detached(self: Any, x_BTI: mx.array, real: Any = lora.LoRALinear.__call__) -> mx.array:
    if not isinstance(self.linear, nn.QuantizedLinear):
        return real(self, x_BTI)
    return mx.stop_gradient(self.linear(x_BTI)) + self.scale * self.update_BTO(x_BTI)


def packed_base_detached(
    self: Any,
    x_NI: mx.array,
    dropped: Any,
    dys: Any,
    outputs: Any,
    real: Any = projection.JointLinears.backward,
) -> Any:
    none = {
        j: part._replace(weight_OI=mx.zeros((dys[j].shape[1], x_NI.shape[1])))
        for j, part in enumerate(self.parts)
        if isinstance(part.weight_OI, packed.Packed)
    }
    return real(
        projection.JointLinears([none.get(j, part) for j, part in enumerate(self.parts)], x_NI.dtype),
        x_NI,
        dropped,
        dys,
        outputs,
    )


def padded_with_zeros(x_NV: mx.array) -> mx.array:
    V = x_NV.shape[-1]
    if V <= 512:
        return mx.logsumexp(x_NV, axis=-1)
    padded_NV = mx.pad(x_NV, [(0, 0), (0, -V % 512)])
    return padded_with_zeros(mx.logsumexp(mx.unflatten(padded_NV, -1, (-1, 512)), axis=-1))


def magnitude_not_decayed(
    self: Any, model: Any, gradients: Any, real: Any = vectors.VectorOptimizer.update
) -> None:
    before = self.factors.get("magnitude")
    real(self, model, gradients)
    if before is not None:
        of_b = self.optimizers[1]
        self.factors["magnitude"] += of_b.learning_rate * of_b.weight_decay * before
        self.write_back(model)


def with_peak(self: Any, rate: float, *others: Any, real: Any = optim.AdamW.__init__, **more: Any) -> None:
    real(self, rate, *others, **more)
    self.peak = rate


def decay_by_the_peak(
    self: Any, gradient: Any, parameter: Any, of: Any, real: Any = optim.AdamW.apply_single
) -> Any:
    difference = self.learning_rate - self.peak
    return real(self, gradient, parameter, of) + difference * self.weight_decay * parameter


def rate_or_peak(self: Any, learning_rate: float, real: Any = optim.LoRAOptimizer.set_learning_rate) -> None:
    real(self, learning_rate or self.peak)


def remember_peak(self: Any, config: Any, real: Any = optim.LoRAOptimizer.__init__) -> None:
    real(self, config)
    self.peak = config.learning_rate


def tokens_of_the_last(*args: Any, **more: Any) -> Any:
    model, optimizer, windows, *others = args
    seen: list[Any] = []

    def watched() -> Any:
        for window in windows:
            seen.append(window)
            yield window

    for record in train.train(model, optimizer, watched(), *others, **more):
        yield replace(record, num_tokens=seen[-1][-1].num_tokens)


def fit_with_fresh_moments(self: Any, examples: Any) -> Any:
    every = batching.updates_an_epoch([num_inputs(example) for example in examples], self.training)

    def windows() -> Any:
        for step, window in enumerate(training_windows(examples, self.training, self.step), self.step):
            if step % every == 0:
                for optimizer in self.optimizer.optimizers:
                    optimizer.state["step"] = mx.zeros_like(optimizer.step)
                    for moments in filter(lambda value: isinstance(value, dict), optimizer.state.values()):
                        moments.update(tree_map(mx.zeros_like, moments))
            yield window

    yield from self.fit_windows(windows())


UPDATES = (
    Mutant(
        "queries-and-keys-share-a-norm",
        2,
        "The norms of queries and keys are one module, so the weight that is loaded last serves both.",
        {"mlx_impl.model.Attention.__init__": one_norm},
        cases=("qk norm",),
    ),
    Mutant(
        "logsumexp-padded-with-zeros",
        1,
        "A vocabulary that is no multiple of 512 is padded with zeros, each a token of logit 0.",
        {"mlx_impl.ops.logsumexp": padded_with_zeros},
        trainer=PLAIN,
    ),
    Mutant(
        "rslora-of-the-default-rank",
        13,
        "rsLoRA divides by the root of the default rank, also where a pattern gives a linear its own.",
        {"mlx_impl.targets.rank_and_scale": scale_of_the_default_rank},
    ),
    Mutant(
        "num-layers-lost-with-an-expression",
        17,
        "Where the targets are an expression, num_layers is not applied and all layers get an adapter.",
        {"mlx_impl.lora.select_targets": select_by_expression},
    ),
    Mutant(
        "scales-in-equal-shares",
        5,
        "Linears of one input get their scales as if all had the same rank, which a pattern may change.",
        {"mlx_impl.fast.projection.times_scale": equal_shares},
        cases=("patterns",),
    ),
    Mutant(
        "quantized-base-detached",
        15,
        "A quantized base passes no gradient to its input, so lower layers learn through adapters alone.",
        {
            "mlx_impl.lora.LoRALinear.__call__": quantized_base_detached,
            "mlx_impl.fast.projection.JointLinears.backward": packed_base_detached,
        },
    ),
    Mutant(
        "magnitude-not-decayed",
        8,
        "The magnitudes of DoRA are left out of the weight decay, as vectors are elsewhere.",
        {"mlx_impl.fast.vectors.VectorOptimizer.update": magnitude_not_decayed},
        cases=("dora",),
    ),
    Mutant(
        "decay-by-the-peak-rate",
        8,
        "The weight decay is multiplied by the peak learning rate, not by that of the update.",
        {"mlx_impl.optim.AdamW.__init__": with_peak, "mlx_impl.optim.AdamW.apply_single": decay_by_the_peak},
    ),
    Mutant(
        "rate-zero-is-the-peak",
        8,
        "A learning rate of 0 counts as none given, so the first update of a warmup uses the peak.",
        {
            "mlx_impl.optim.LoRAOptimizer.__init__": remember_peak,
            "mlx_impl.optim.LoRAOptimizer.set_learning_rate": rate_or_peak,
        },
    ),
    Mutant(
        "tokens-of-the-last-micro-batch",
        8,
        "A record counts the tokens of the last micro-batch of its update alone.",
        training(tokens_of_the_last),
    ),
    Mutant(
        "moments-forgotten-at-each-epoch",
        12,
        "The optimizer is made anew at each epoch, as in a loop over epochs that builds it inside.",
        {"mlx_impl.run.trainer.LoRATrainer.fit": fit_with_fresh_moments},
    ),
    Mutant(
        "checkpointed-layers-share-masks",
        14,
        "The random state does not move on after a checkpointed block, so all blocks draw the same masks.",
        {"mlx_impl.recompute.RandomKeys.pass_on": lambda self: None},
    ),
)

# ---- the run around the updates, files, merging, answers

NOW: list[Any] = []  # the kept positions of the batch at hand


def arrays_without_kept(batch: Any) -> Any:
    *arrays, kept = forward.to_arrays(batch)
    NOW[:] = [kept]
    return arrays


def loss_by_what_is_kept_now(model: Any, arrays: Any) -> Any:
    return forward.batch_loss(model, [*arrays, *NOW])


def state_alone(model: Any, optimizer: Any, before: Any) -> None:
    optimizer.state = tree_unflatten(list(before.items()))


def guarded_before_loading(self: Any, path: Any, examples: Any, real: Any = LoRATrainer.resume) -> None:
    before = guard.snapshot(self.model, self.optimizer)
    real(self, path, examples)
    self.guard.now, self.guard.good = before, (self.step, before)
    self.guard.begin = lambda: None


def resumed_without_history(self: Any, path: Any, examples: Any, real: Any = LoRATrainer.resume) -> None:
    real(self, path, examples)
    self.validation = []


def digest_of_tokens(examples: Any) -> str:
    return hashlib.sha256(json.dumps([list(map(int, e.tokens)) for e in examples]).encode()).hexdigest()


def in_the_order_of_names(tree: Any, factors: Any) -> Any:
    arrays = sorted(tree_flatten(tree))
    state: dict[str, Any] = {name: array for name, array in arrays if "." not in name}
    for moment in {name.rpartition(".")[2] for name, _ in arrays if "." in name}:
        of_moment = [
            (name.removesuffix(f".{moment}"), a) for name, a in arrays if name.endswith(f".{moment}")
        ]
        for kind, vector in vectors.joined(of_moment).items():
            state.setdefault(kind, {})[moment] = vector
    return state


def begun_again(self: Any, model: Any, *others: Any, real: Any = LoRATrainer.__init__, **more: Any) -> None:
    for layer in lora.lora_layers(model).values():
        layer.lora_b = mx.zeros_like(layer.lora_b)
    real(self, model, *others, **more)


def length_once(linear: Any, real: Any = low_rank_of) -> Any:
    """By a magnitude that makes up for the change of the length."""
    part = real(linear)
    if part is None or part.magnitude_O is None or linear.training:
        return part
    if "length" not in vars(linear):
        object.__setattr__(linear, "length", linear.length_O())
    return part._replace(magnitude_O=part.magnitude_O * linear.length_O() / linear.length)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()


def check_and_keep(self: Any, window: Any, record: Any, real: Any = guard.FiniteGuard.check) -> None:
    real(self, window, record)
    vars(self).setdefault("history", []).append(self.now)


def plain_without_bias(linear: Any, weight_OI: mx.array, real: Any = quantized.plain_module) -> Any:
    module = real(linear, weight_OI)
    module.pop("bias", None)
    return module


def quantized_as_before(linear: Any, weight_OI: mx.array, real: Any = quantized.plain_module) -> Any:
    module = real(linear, weight_OI)
    is_quantized = isinstance(linear, nn.QuantizedLinear)
    return module.to_quantized(linear.group_size, linear.bits) if is_quantized else module


def put_back_frozen(named: Any) -> Any:
    for _, layer in named:
        if isinstance(layer, lora.LoRALinear):
            layer.freeze()
            layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    return tree_unflatten(named)


def record_without_dora(*settings: Any, real: Any = peft.to_record) -> Any:
    return real(*settings) | {"use_dora": False}


def causal_from_the_top_left(
    q_BHTK: Any, k_BGSK: Any, v_BGSK: Any, mask_B1TS: Any, real: Any = plain_ops.attention
) -> Any:
    T, S = q_BHTK.shape[2], k_BGSK.shape[2]
    if mask_B1TS is None and 1 < T < S:
        mask_B1TS = (mx.arange(S) <= mx.arange(T)[:, None])[None, None]
    return real(q_BHTK, k_BGSK, v_BGSK, mask_B1TS)


def mask_of_many(T: int, offset: int, window: Any, segment_BT: Any, real: Any = model.attention_mask) -> Any:
    return None if T == 1 and offset else real(T, offset, window, segment_BT)


def ended_by_the_prompt(
    model: Any,
    caches: Any,
    prompts: Any,
    max_tokens: int,
    stop_ids: Any,
    watched: Any,
    real: Any = decode.decode_batch,
) -> Any:
    replies = real(model, caches, prompts, max_tokens, stop_ids, watched)
    return [
        reply[: 1 if set(prompt) & set(stop_ids) else None]
        for prompt, reply in zip(prompts, replies, strict=True)
    ]


def nucleus_first(self: Any, logits_BV: mx.array) -> mx.array:
    if self.temperature == 0:
        return mx.argmax(logits_BV, axis=-1)
    logits_BV = sampling.cut_to_nucleus(logits_BV.astype(mx.float32), self.top_p)
    return mx.random.categorical(logits_BV / self.temperature)


RUNS = (
    Mutant(
        "compiled-keeps-the-first-layout",
        10,
        "A compiled step does not get the kept positions as inputs, so the first batch's are constants.",
        {
            "mlx_impl.run.trainer.FAST": forward.FAST._replace(
                to_arrays=arrays_without_kept, batch_loss=loss_by_what_is_kept_now
            )
        },
    ),
    Mutant(
        "rollback-of-the-optimizer-alone",
        12,
        "After NaN the optimizer is rolled back, but the model keeps the ruined factors.",
        {"mlx_impl.run.guard.restore": state_alone},
    ),
    Mutant(
        "rollback-to-before-the-resume",
        12,
        "The guard takes its only snapshot before the state is loaded, so a rollback loses the resumed run.",
        {"mlx_impl.run.trainer.LoRATrainer.resume": guarded_before_loading},
    ),
    Mutant(
        "validations-not-resumed",
        12,
        "A resumed run has forgotten its validation losses, so its first one is the best.",
        {"mlx_impl.run.trainer.LoRATrainer.resume": resumed_without_history},
    ),
    Mutant(
        "resumed-with-other-targets",
        12,
        "Examples are told apart by their tokens alone, so a run goes on with other targets unnoticed.",
        {"mlx_impl.run.state.digest_of_examples": digest_of_tokens},
    ),
    Mutant(
        "moments-in-the-order-of-names",
        12,
        "Loaded moments are joined in the order of their names, and the factors in that of the model.",
        {"mlx_impl.fast.vectors.from_tree": in_the_order_of_names},
    ),
    Mutant(
        "loaded-adapter-begins-again",
        5,
        "A new trainer on a model with an adapter sets every B to zero, and what it had learned is lost.",
        {"mlx_impl.run.trainer.LoRATrainer.__init__": begun_again},
    ),
    Mutant(
        "dora-length-of-the-first-evaluation",
        9,
        "The lengths of DoRA's rows are kept at the first evaluation, and later ones use them again.",
        {"mlx_impl.fast.projection.low_rank_of": length_once},
        cases=("dora",),
    ),
    Mutant(
        "evaluation-leaves-dropout-on",
        14,
        "After an evaluation a model that was in evaluation is in training, and drops inputs.",
        {"mlx_impl.train.in_evaluation": evaluating},
    ),
    Mutant(
        "every-snapshot-kept",
        15,
        "The guard keeps the factors and moments of every update, and memory grows with the run.",
        {"mlx_impl.run.guard.FiniteGuard.check": check_and_keep},
    ),
    Mutant(
        "merged-without-bias",
        16,
        "A merged linear has lost its bias.",
        {"mlx_impl.run.merging.plain_module": plain_without_bias},
        cases=("qkv bias",),
    ),
    Mutant(
        "merged-and-quantized-again",
        16,
        "A merged weight of a quantized base is quantized again, and a small update is rounded away.",
        {"mlx_impl.run.merging.plain_module": quantized_as_before},
    ),
    Mutant(
        "magnitudes-frozen-by-unmerging",
        16,
        "Unmerging freezes the base again, and with it the magnitudes of DoRA.",
        {"mlx_impl.run.merging.tree_unflatten": put_back_frozen},
        cases=("dora",),
    ),
    Mutant(
        "dora-not-saved",
        17,
        "The record of an adapter file says that it is not DoRA, so its magnitudes have no place.",
        {"mlx_impl.files.formats.peft.to_record": record_without_dora},
        cases=("dora",),
    ),
    Mutant(
        "causal-from-the-top-left",
        19,
        "Behind a cache the causal mask of several tokens begins at the first key, as in PyTorch.",
        {
            "mlx_impl.ops.attention": causal_from_the_top_left,
            "mlx_impl.fast.ops.attention_of_any": partial(
                causal_from_the_top_left, real=fast_ops.attention_of_any
            ),
        },
    ),
    Mutant(
        "one-token-needs-no-mask",
        19,
        "A single token behind a cache gets no mask, and so sees beyond the sliding window.",
        {"mlx_impl.model.attention_mask": mask_of_many},
        cases=("sliding window",),
    ),
    Mutant(
        "ended-by-the-prompt",
        19,
        "The end of an answer is looked for in the whole text, and an earlier turn's end is found.",
        {"mlx_impl.fast.decode.decode_batch": ended_by_the_prompt},
    ),
    Mutant(
        "nucleus-before-temperature",
        19,
        "The nucleus is cut before the temperature is applied, and has too few tokens.",
        {"mlx_impl.run.sampling.Sampling.__call__": nucleus_first},
    ),
)

MUTANTS: tuple[Mutant, ...] = (*LAYOUT, *UPDATES, *RUNS)
