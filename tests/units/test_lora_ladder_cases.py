"""The base case of the ladder is one that other people's configuration classes can say."""

from __future__ import annotations

from tests.lora_ladder.cases import ARCHITECTURES, SPEC

ODD = "odd heads"


def test_the_width_is_a_multiple_of_the_heads_but_in_one_architecture() -> None:
    """transformers' LlamaConfig refuses a width that is no multiple of the number of heads."""
    odd = [n for n, spec in ARCHITECTURES.items() if spec.hidden_size % spec.num_attention_heads]
    assert odd == [ODD]


def test_the_base_case_has_grouped_heads_and_no_square_layer() -> None:
    queries, keys = (n * SPEC.head_dim for n in (SPEC.num_attention_heads, SPEC.num_key_value_heads))
    assert len({queries, keys, SPEC.hidden_size, SPEC.intermediate_size, SPEC.vocab_size}) == 5
