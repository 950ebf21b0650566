"""The encoder: embeddings, then one scan over groups of post-norm blocks.

A group is the shortest repeating run of blocks (`moe_every=2`: one dense block and one MoE block),
so compile time does not grow with depth. Layers that do not fill a group form the `tail`, another
group. Parameters are a plain nested dict; the blocks' carry a leading group axis.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_embed_jax.kernels.cpu_products import dtype_between_products
from moe_embed_jax.mesh import BATCH_SPEC, ROWS_SPEC
from moe_embed_jax.models.attention import Attention, rotation
from moe_embed_jax.models.encoder_config import EncoderConfig
from moe_embed_jax.models.feed_forward import FeedForward
from moe_embed_jax.models.int8_weight import input_axis
from moe_embed_jax.models.layer_norm import LayerNorm
from moe_embed_jax.models.linear import Linear
from moe_embed_jax.models.moe import MoE
from moe_embed_jax.models.remat import rematerialised_map
from moe_embed_jax.routing.router import RoutingStatistics
from moe_embed_jax.shapes import PADDING
from moe_embed_jax.sharding import gather, is_array, path_of, rules_for, specs
from moe_embed_jax.unstacked import Unstacked, is_unstacked, piece_of, unstack

ZEROS = nnx.initializers.zeros  # where only shapes are asked: a fifth of the trace of a normal one
BLOCK_SUM = "block_sum"  # the sum before the last norm of a block: what `remat_rows` saves


def _norm(config: EncoderConfig, rngs: nnx.Rngs) -> LayerNorm:
    return LayerNorm(config.width, epsilon=config.norm_epsilon, rngs=rngs)


class Embeddings(nnx.Module):
    def __init__(self, config: EncoderConfig, init, rngs: nnx.Rngs):
        self.dtype = config.dtype
        self.token = nnx.Param(init(rngs.params(), (config.vocab_size, config.width)))
        # The released layout keeps BERT's table; a text that stands alone is of type 0.
        self.token_type = nnx.Param(init(rngs.params(), (config.token_types, config.width)))
        position_shape = (config.max_positions, config.width)
        learned = config.positions == "learned"
        self.position = nnx.Param(init(rngs.params(), position_shape)) if learned else None
        self.norm = _norm(config, rngs)

    def __call__(self, token_RL, position_RL):
        x_RLD = self.token[...][token_RL] + self.token_type[...][0]
        if self.position is not None:
            x_RLD += self.position[...][position_RL]
        return self.norm(x_RLD).astype(dtype_between_products(self.dtype))


class Block(nnx.Module):
    """Post-norm: attention, add, norm; feed-forward, MoE, or MoE + shared expert, add, norm."""

    def __init__(self, config: EncoderConfig, is_moe: bool, init, rngs: nnx.Rngs):
        linear = functools.partial(Linear, dtype=config.dtype, kernel_init=init, rngs=rngs)
        self.attention = Attention(config.width, config.num_heads, linear)
        self.norm_1 = _norm(config, rngs)
        self.moe = MoE(config, init, rngs) if is_moe else None
        ffn_width = config.shared_expert_width if is_moe else config.ffn_width
        self.feed_forward = FeedForward(config.width, ffn_width, linear) if ffn_width else None
        self.norm_2 = _norm(config, rngs)

    def __call__(self, x_RLD, text_index_RL, rotation_RLJ, keep_choices=False):
        """(x_RLD, statistics or None)."""
        dtype = x_RLD.dtype
        attended_RLD = self.attention(x_RLD, text_index_RL, rotation_RLJ)
        x_RLD = self.norm_1(attended_RLD + x_RLD).astype(dtype)
        sum_RLD, statistics = x_RLD, None
        if self.moe is not None:
            y_RLD, statistics = self.moe(x_RLD, text_index_RL >= 0, keep_choices)
            sum_RLD = y_RLD + sum_RLD
        if self.feed_forward is not None:
            sum_RLD = self.feed_forward(x_RLD) + sum_RLD
        # With the saved sum the results of these layers are not computed again.
        sum_RLD = checkpoint_name(sum_RLD, BLOCK_SUM)
        return self.norm_2(sum_RLD).astype(dtype), statistics


class Group(nnx.Module):
    """The repeating unit: the first `size` blocks, of which at most one has experts."""

    def __init__(self, config: EncoderConfig, size: int, init, rngs: nnx.Rngs):
        self.size = size
        for i in range(size):
            setattr(self, f"block_{i}", Block(config, config.is_moe(i), init, rngs))

    def __call__(self, x_RLD, text_index_RL, rotation_RLJ, keep_choices=False):
        """(x_RLD, statistics or None)."""
        statistics = None
        for i in range(self.size):
            block = getattr(self, f"block_{i}")
            x_RLD, block_statistics = block(x_RLD, text_index_RL, rotation_RLJ, keep_choices)
            statistics = statistics if block_statistics is None else block_statistics
        return x_RLD, statistics


def _pure(module: nnx.Module) -> dict:
    return nnx.to_pure_dict(nnx.state(module))


def init_params(config: EncoderConfig, key: jax.Array) -> dict:
    """{"embeddings": ..., "groups": ..., "tail": ...}; block leaves have a leading axis G."""
    return _initialized(config, nnx.initializers.normal(config.initializer_range), key)


def _initialized(config: EncoderConfig, init, key: jax.Array) -> dict:
    embeddings_key, groups_key = jax.random.split(key)
    params = {"embeddings": _pure(Embeddings(config, init, nnx.Rngs(embeddings_key)))}
    for name, (count, size) in config.parts.items():

        def one_group(key, size=size):
            return _pure(Group(config, size, init, nnx.Rngs(key)))

        params[name] = jax.vmap(one_group)(jax.random.split(groups_key, count))
        groups_key = jax.random.fold_in(groups_key, 1)
    return params


@functools.cache
def abstract_params(config: EncoderConfig) -> dict:
    """The tree of `init_params` as ShapeDtypeStructs; it is shared, and must not be changed."""
    return jax.eval_shape(lambda: _initialized(config, ZEROS, jax.random.key(0)))


@functools.cache
def _structure(kind: type[nnx.Module], *arguments) -> tuple[nnx.GraphDef, nnx.State]:
    """Of the module `kind(*arguments, init, rngs)`, which is only traced for it."""
    return nnx.split(nnx.eval_shape(lambda: kind(*arguments, ZEROS, nnx.Rngs(0))))


def _module(params: dict, kind: type[nnx.Module], *arguments) -> nnx.Module:
    """The module `kind(*arguments, init, rngs)` around given parameters."""
    graphdef, state = _structure(kind, *arguments)
    state = jax.tree.map(lambda leaf: leaf, state)  # a copy, into which the parameters go
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def gather_embeddings(config: EncoderConfig, params: dict) -> dict:
    """Inside shard_map: `params` with whole embedding tables, which `encode_rows` expects. Blocks
    are gathered when their turn comes, tables once for all chunks."""
    placed = specs(params, rules_for(config))["embeddings"]
    return params | {"embeddings": gather(params["embeddings"], placed, "fsdp")}


def in_compute_dtype(config: EncoderConfig, params: dict) -> dict:
    """`params` with the matrices and biases of blocks in `config.dtype`, as blocks use them: for
    callers that run many chunks, so that each is converted once. Norms and router stay float32."""

    def cast(key_path, leaf):
        path = path_of(key_path)
        stays = path.startswith("embeddings/") or re.search(r"norm_\d/|router/", path)
        return leaf if stays else leaf.astype(config.dtype)

    return jax.tree_util.tree_map_with_path(cast, params, is_leaf=is_array)


def unstack_params(params: dict) -> dict:
    """`params` on a CPU with `Unstacked` blocks and experts, to encode few texts fast. Takes the
    parameters out of `params`, so that memory holds no second copy of them."""

    def unstacked(tree: dict, path: str) -> dict:
        result = {}
        for name in list(tree):
            leaf, own_path = tree.pop(name), f"{path}/{name}"
            if isinstance(leaf, dict):
                result[name] = unstacked(leaf, own_path)
            else:
                result[name] = leaf if leaf is None else _unstacked(leaf, own_path)
        return result

    embeddings = {"embeddings": params.pop("embeddings")}
    return embeddings | {name: unstacked(params.pop(name), name) for name in list(params)}


def _unstacked(leaf: jax.Array, path: str) -> Unstacked:
    axes = 2 if re.search(r"/moe/(w_in|w_out|bias_in)$", path) else 1
    return unstack(leaf, axes, input_axis(path) is not None, leaf.device)


def encode_rows(
    config: EncoderConfig, params: dict, token_RL, text_index_RL, position_RL, keep_choices=False
) -> tuple[jax.Array, RoutingStatistics | None]:
    """`encode_tokens` of one device's rows, inside shard_map: `params` is this device's part, with
    whole embedding tables, and the statistics count its own tokens.

    `keep_choices`: the statistics have `expert_RLK`; not together with `remat_rows`."""
    rows = token_RL.shape[0]
    slices = -(-rows // config.remat_rows) if config.remat_rows else 1
    padding = ((0, -rows % slices), (0, 0))
    token_RL, position_RL = (jnp.pad(array, padding) for array in (token_RL, position_RL))
    text_index_RL = jnp.pad(text_index_RL, padding, constant_values=PADDING)

    embeddings = _module(params["embeddings"], Embeddings, config)
    x_RLD = embeddings(token_RL, position_RL)
    rotation_RLJ = None
    if config.positions == "rotary":  # the same in all layers
        head = config.width // config.num_heads
        rotation_RLJ = rotation(position_RL, head, config.rotary_base)
    context = text_index_RL, rotation_RLJ
    placed = specs(params, rules_for(config))
    statistics = []
    for name, (count, size) in config.parts.items():
        whole = functools.partial(gather, tree_specs=placed[name], axis="fsdp", skip=1)
        one_group = functools.partial(
            _one_group, config, size, whole, slices, keep_choices, context
        )
        x_RLD, part_statistics = _each_group(one_group, count, x_RLD, params[name])
        if part_statistics is not None:
            statistics.append(part_statistics)
    x_RLD = x_RLD[:rows]
    if not statistics:
        return x_RLD, None
    return x_RLD, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *statistics)


def _each_group(one_group, count: int, x_RLD, params):
    """`jax.lax.scan` over the groups; unrolled for `Unstacked` parameters."""
    if not is_unstacked(params):
        return jax.lax.scan(one_group, x_RLD, params)
    one_group = jax.jit(one_group)  # traced once
    statistics = []
    for g in range(count):
        x_RLD, of_group = one_group(x_RLD, piece_of(params, g))
        statistics.append(of_group)
    return x_RLD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *statistics)


def _one_group(config, size: int, whole, slices: int, keep_choices: bool, context, x_RLD, params):
    """(x_RLD, statistics) of one group; `params` are this device's shards."""

    def block(weights, x_RLD, context):
        group = _module(weights, Group, config, size)
        return group(x_RLD, *context, keep_choices)

    cast = functools.partial(in_compute_dtype, config)
    if config.remat_rows:
        return rematerialised_map(
            block,
            gather=whole,
            cast=cast,
            slices=slices,
            params=params,
            x_RLD=x_RLD,
            context=context,
            saved_names=(BLOCK_SUM,),
        )
    return block(whole(cast(params)), x_RLD, context)


def encode_tokens(
    config: EncoderConfig, params: dict, token_RL, text_index_RL, position_RL
) -> tuple[jax.Array, RoutingStatistics | None]:
    """Token states and the statistics of every MoE layer.

    Args:
      token_RL: int32 ids. text_index_RL: which text of its row a token belongs to, -1 padding.
      position_RL: position within the text.

    Returns:
      x_RLD in `config.dtype`, on CPUs in float32 (padding: unspecified finite values), and
      `RoutingStatistics` with a leading axis of MoE layers, or None without experts. Rows are
      sharded over the mesh in context.
    """

    def local(params, *rows):
        x_RLD, statistics = encode_rows(config, gather_embeddings(config, params), *rows)
        return x_RLD, jax.tree.map(lambda leaf: leaf[None], statistics)

    x_RLD, statistics = jax.shard_map(
        local,
        in_specs=(specs(params, rules_for(config)), *(BATCH_SPEC,) * 3),
        out_specs=BATCH_SPEC,
        check_vma=False,
    )(params, token_RL, text_index_RL, position_RL)
    return x_RLD, jax.tree.map(lambda leaf: leaf.sum(axis=0), statistics)


def expert_choices(config: EncoderConfig, params: dict, token_RL, text_index_RL, position_RL):
    """The experts that the routers choose: int32 expert_YRLK, Y layers with experts, the one with
    the largest gate first; E for padding. Arguments and mesh as for `encode_tokens`."""
    # Statistics of slices are summed, and without a backward pass there is little to save.
    config = dataclasses.replace(config, remat_rows=0)

    def local(params, *rows):
        params = gather_embeddings(config, params)
        return encode_rows(config, params, *rows, keep_choices=True)[1].expert_RLK

    return jax.shard_map(
        local,
        in_specs=(specs(params, rules_for(config)), *(BATCH_SPEC,) * 3),
        out_specs=ROWS_SPEC,
        check_vma=False,
    )(params, token_RL, text_index_RL, position_RL)


def count_params(config: EncoderConfig) -> tuple[int, int]:
    """(total, active per token): a token uses K of the E experts of each MoE layer."""
    total = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
    expert = (2 * config.width + config.expert_bias) * config.ffn_width
    idle = config.num_experts - config.experts_per_token
    return total, total - config.num_moe_layers * idle * expert
