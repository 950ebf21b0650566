"""Decoders whose training steps others measured on TPUs, rebuilt for planner_validation.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A pre-norm decoder with rotary positions, RMS norms and SwiGLU, trained in bfloat16 with
    AdamW on float32 parameters; layers are one scan.

    rows: of a device at a time, of `length` tokens. micro: batches whose gradients are added up.
    remat: what of a layer is kept for the backward pass: "all", "none" or "products".
    block: tokens of a block of attention. loss_chunks: parts of the tokens that have logits at a
    time, and are computed twice; 1: all, once. qk_norm: RMS norms of queries and keys. cap: of the
    logits, by tanh. clip: gradients are cut at norm 1. one_hot: embeddings are a product with
    one-hot rows.
    """

    vocab: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    ffn: int
    length: int
    rows: int
    block: int
    micro: int = 1
    remat: str = "all"
    loss_chunks: int = 1
    qk_norm: bool = False
    cap: float = 0.0
    clip: bool = False
    one_hot: bool = False

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], P]]:
        """Shape and sharding of every parameter; of layers without the leading axis."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        columns, rows = P("fsdp", "tensor"), P("tensor", "fsdp")
        return {
            "q": ((self.width, q), columns),
            "k": ((self.width, kv), columns),
            "v": ((self.width, kv), columns),
            "out": ((q, self.width), rows),
            "gate": ((self.width, self.ffn), columns),
            "up": ((self.width, self.ffn), columns),
            "down": ((self.ffn, self.width), rows),
            "norm_1": ((self.width,), P()),
            "norm_2": ((self.width,), P()),
        }

    def parameters(self, mesh, dtype=jnp.float32) -> dict:
        """ShapeDtypeStructs: {"layers": ..., "embedding", "head", "norm"}."""

        def leaf(shape, spec):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

        layers = {
            name: leaf((self.layers, *shape), P(None, *spec))
            for name, (shape, spec) in self.shapes.items()
        }
        return {
            "layers": layers,
            "embedding": leaf((self.vocab, self.width), P("tensor", "fsdp")),
            "head": leaf((self.width, self.vocab), P("fsdp", "tensor")),
            "norm": leaf((self.width,), P()),
        }

    def tokens(self, mesh, dims=()) -> jax.ShapeDtypeStruct:
        rows = self.rows * mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["tensor"]
        spec = NamedSharding(mesh, P(*[None] * len(dims), BATCH))
        return jax.ShapeDtypeStruct((*dims, rows, self.length), jnp.int32, sharding=spec)

    def loss(self, params, token_RL):
        """Mean cross entropy of the next tokens."""
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        if self.one_hot:
            x_RLD = jax.nn.one_hot(token_RL, self.vocab, dtype=jnp.bfloat16) @ params["embedding"]
        else:
            x_RLD = params["embedding"][token_RL]
        policies = jax.checkpoint_policies
        layer = self._layer
        if self.remat == "none":
            layer = jax.checkpoint(layer, policy=policies.nothing_saveable)
        elif self.remat == "products":
            layer = jax.checkpoint(layer, policy=policies.checkpoint_dots_with_no_batch_dims)
        x_RLD, _ = jax.lax.scan(layer, _on_batch(x_RLD), params["layers"])
        x_RLD, target_RL = _norm(x_RLD, params["norm"]), jnp.roll(token_RL, -1, axis=1)
        if self.loss_chunks == 1:
            return self._cross_entropy(params["head"], x_RLD, target_RL) / token_RL.size
        parts = (
            x_RLD.reshape(self.loss_chunks, -1, self.width),
            target_RL.reshape(self.loss_chunks, -1),
        )
        one = jax.checkpoint(functools.partial(self._cross_entropy, params["head"]))
        total, _ = jax.lax.scan(lambda total, part: (total + one(*part), None), 0.0, parts)
        return total / token_RL.size

    def step(self, optimizer, params, state, token):
        """One update; `token` has a leading axis of `micro` batches if there are several."""
        value_and_gradient = jax.value_and_grad(self.loss)
        if self.micro == 1:
            loss, gradients = value_and_gradient(params, token)
        else:

            def add(total, token):
                loss, gradients = value_and_gradient(params, token)
                return jax.tree.map(jnp.add, total, gradients), loss

            gradients, loss = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), token)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, jnp.mean(loss)

    def optimizer(self):
        adamw = optax.adamw(3e-4, b2=0.95, weight_decay=0.1)
        return optax.chain(optax.clip_by_global_norm(1.0), adamw) if self.clip else adamw

    @property
    def scores(self) -> float:
        """Of a device and layer at a time, in the blocks that a causal mask leaves."""
        blocks = self.length // self.block
        return self.rows * self.heads * self.length**2 * (blocks + 1) / (2 * blocks)

    def _layer(self, x_RLD, w):
        hidden_RLD = _norm(x_RLD, w["norm_1"])
        q, k, v = (self._heads(hidden_RLD @ w[name]) for name in ("q", "k", "v"))
        if self.qk_norm:
            q, k = _norm(q), _norm(k)
        context = self._attend(_rotate(q) * self.head**-0.5, _rotate(k), v)
        x_RLD = _on_batch(x_RLD + context @ w["out"])
        hidden_RLD = _norm(x_RLD, w["norm_2"])
        hidden_RLF = jax.nn.silu(hidden_RLD @ w["gate"]) * (hidden_RLD @ w["up"])
        return _on_batch(x_RLD + hidden_RLF @ w["down"]), None

    def _heads(self, x):
        return x.reshape(*x.shape[:2], -1, self.head)

    def _attend(self, q, k, v):
        names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
        sizes = splash.BlockSizes(**{f"block_{name}": self.block for name in names})
        is_mqa = self.kv_heads == 1
        make = (
            splash.make_splash_mqa_single_device if is_mqa else splash.make_splash_mha_single_device
        )

        def on_device(q, k, v):
            mask = masks.MultiHeadMask([masks.CausalMask((self.length,) * 2)] * q.shape[1])
            if is_mqa:
                k, v = k[:, 0], v[:, 0]
            return jax.vmap(make(mask, block_sizes=sizes))(q, k, v)

        spec = P(BATCH, "tensor")
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        context = jax.shard_map(on_device, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(
            q, k, v
        )
        return context.swapaxes(1, 2).reshape(len(context), self.length, -1)

    def _cross_entropy(self, head_DV, x, target):
        logits = (x @ head_DV).astype(jnp.float32)
        if self.cap:
            logits = self.cap * jnp.tanh(logits / self.cap)
        own = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - own)


def _on_batch(x):
    return jax.lax.with_sharding_constraint(x, P(BATCH))


def _norm(x, scale=None):
    y = x.astype(jnp.float32)
    y = (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)
    return y if scale is None else y * scale


def _rotate(x_RLHJ):
    half = x_RLHJ.shape[-1] // 2
    angle_LJ = jnp.arange(x_RLHJ.shape[1])[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = (f(angle_LJ).astype(x_RLHJ.dtype)[:, None] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x_RLHJ, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
