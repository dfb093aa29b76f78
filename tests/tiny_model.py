"""The configuration of a tiny Llama, of which the tests of files and peers make their models.

It is not the ladder's, which stands by itself and whose width is no multiple of the heads; nor that of the
goldens, which are recorded; nor that of the benchmarks, whose sizes suit the kernels.
"""

from __future__ import annotations

from mlx_impl.config import ModelConfig

# All sizes differ, so that no two can be confused; the vocabulary is a prime. heads * head_dim is not the
# width, and the width is a multiple of heads, which transformers requires.
TINY_LLAMA = ModelConfig(
    vocab_size=61,
    hidden_size=30,
    intermediate_size=44,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    rms_norm_eps=1e-5,
    rope_theta=1000.0,
    tie_word_embeddings=False,
)
