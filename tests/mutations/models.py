"""Faults of the encoder: attention, positions, norms, chunks and int8 weights."""

from mutations.fault import Fault

PARITY = "test_interop.py -k 'parity_with_float64 and published'"

FAULTS = (
    Fault(
        "attention-crosses-the-texts-of-a-row",
        "models/attention.py",
        "same_RLM = text_index_RL[:, :, None] == text_index_RL[:, None, :]",
        "same_RLM = (text_index_RL[:, :, None] >= 0) == (text_index_RL[:, None, :] >= 0)",
        "test_encoder.py -k 'packed_equals and 0-options0'",
    ),
    Fault(
        "attention-scores-not-scaled",
        "models/attention.py",
        "scale = q_RHLC.shape[-1] ** -0.5",
        "scale = 1.0",
        PARITY,
    ),
    Fault(
        "rotary-turns-the-other-way",
        "models/attention.py",
        "jnp.concatenate([-sin, sin], axis=-1)",
        "jnp.concatenate([sin, -sin], axis=-1)",
        "test_encoder.py -k rotary",
    ),
    Fault(
        "slope-of-the-tpu-kernels-gelu-is-phi-alone",
        "models/feed_forward.py",
        "return ((_phi(x) + x * bell) * dy,)",
        "return (_phi(x) * dy,)",
        "test_encoder.py -k gelu_of_tpu_kernels",
    ),
    Fault(
        "gelu-is-the-tanh-one",
        "models/feed_forward.py",
        "jax.nn.gelu(x, approximate=False)",
        "jax.nn.gelu(x, approximate=True)",
        PARITY,
    ),
    Fault(
        "norm-before-the-residual",
        "models/encoder.py",
        "self.norm_1(attended_RLD + x_RLD).astype(dtype)",
        "(self.norm_1(attended_RLD) + x_RLD).astype(dtype)",
        PARITY,
    ),
    Fault(
        "layer-norm-gradient-without-its-slope",
        "models/layer_norm.py",
        "(dunit_RLD - mean_RL1 - unit_RLD * slope_RL1)",
        "(dunit_RLD - mean_RL1)",
        "test_encoder.py -k layer_norm_and_bias",
    ),
    Fault(
        "experts-in-the-even-layers",
        "models/encoder_config.py",
        "layer % self.moe_every == 1 % self.moe_every",
        "layer % self.moe_every == 0",
        PARITY,
    ),
    Fault(
        "last-layer-of-a-tail-is-forgotten",
        "models/encoder_config.py",
        "full, rest = divmod(self.num_layers, self.group_size)",
        "full, rest = self.num_layers // self.group_size, 0",
        "test_interop.py -k 'by_layer and 5-3'",
    ),
    Fault(
        "chunks-cast-the-router",
        "models/encoder.py",
        r"norm_\d/|router/",
        r"norm_\d/",
        "test_encoder.py test_step.py test_masked_step.py -k bfloat16",
    ),
    Fault(
        "rows-that-fill-up-pieces-are-tokens",
        "models/encoder.py",
        "jnp.pad(text_index_RL, padding, constant_values=PADDING)",
        "jnp.pad(text_index_RL, padding)",
        "test_encoder.py -k remat",
    ),
    Fault(
        "gradcache-loses-the-balance-gradient",
        "models/pieces.py",
        "vjp((dy_rLD, dstatistics))",
        "vjp((dy_rLD, jax.tree.map(jnp.zeros_like, dstatistics)))",
        "test_step.py -k 'chunks_change_nothing and 2'",
    ),
    Fault(
        "gradcache-has-the-statistics-of-one-chunk",
        "models/pieces.py",
        "return (_join(y), _sum(statistics)), (params",
        "return (_join(y), jax.tree.map(lambda leaf: leaf[0], statistics)), (params",
        "test_step.py -k 'chunks_change_nothing and 2'",
    ),
    Fault(
        "kept-sum-has-no-gradient",
        "models/pieces.py",
        "lambda kept, gradient: (gradient, jax.tree.map(jnp.zeros_like, kept)),",
        "lambda kept, gradient: (jnp.zeros_like(gradient), jax.tree.map(jnp.zeros_like, kept)),",
        "test_step.py -k golden",
    ),
    Fault(
        "mean-of-a-single-token-is-halved",
        "models/pooling.py",
        "jnp.maximum(member_RLS.sum(axis=1), 1.0)",
        "jnp.maximum(member_RLS.sum(axis=1), 2.0)",
        PARITY,
    ),
    Fault(
        "spare-words-can-be-predicted",
        "models/heads.py",
        "jnp.where(spare, UNREACHABLE_BIAS, 0.0)",
        "jnp.where(spare, 0.0, UNREACHABLE_BIAS)",
        "test_masked_step.py -k golden",
    ),
    Fault(
        "int8-scale-of-dense-matrices-over-outputs",
        "models/int8_weight.py",
        '(r"/(qkv|out|up|down)/kernel$", -2)',
        '(r"/(qkv|out|up|down)/kernel$", -1)',
        "test_int8_weights.py -k half_a_scale",
    ),
    Fault(
        "int8-scale-of-experts-over-outputs",
        "models/int8_weight.py",
        '(r"/moe/w_(in|out)$", -2)',
        '(r"/moe/w_(in|out)$", -1)',
        "test_int8_weights.py -k half_a_scale",
    ),
)
