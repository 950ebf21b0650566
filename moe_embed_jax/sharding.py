"""One table from parameter path to PartitionSpec.

It serves parameters, optimiser state, checkpoint restore and ahead-of-time compilation. The first
rule that matches wins. A parameter without a rule, or a rule that no parameter uses, is an error
that names it: a silent default is how a renamed layer ends up replicated on a pod. The moments of
an optimiser have the sharding of their parameter, and are split over `data` too (ZeRO stage 1,
arXiv 1910.02054), see `zero`.
"""

import math
import re

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_embed_jax.errors import UserError
from moe_embed_jax.unstacked import Unstacked

# Parameters of blocks have a leading scan axis (G), which is never sharded.
DENSE_RULES = (
    (r"embeddings/token$", P("fsdp", None)),  # [V, D]
    (r"embeddings/token_type$", P()),  # [token types, D]
    (r"embeddings/norm/(scale|bias)$", P()),
    (r"(groups|tail)/.*/attention/qkv/kernel$", P(None, "fsdp", None)),  # [G, D, 3D]
    (r"(groups|tail)/.*/attention/out/kernel$", P(None, None, "fsdp")),  # [G, D, D]
    (r"(groups|tail)/.*/attention/(qkv|out)/bias$", P()),
    (r"(groups|tail)/.*/norm_\d/(scale|bias)$", P()),
)
FEED_FORWARD_RULES = (
    (r"(groups|tail)/.*/feed_forward/up/kernel$", P(None, "fsdp", None)),  # [G, D, F]
    (r"(groups|tail)/.*/feed_forward/down/kernel$", P(None, None, "fsdp")),  # [G, F, D]
    (r"(groups|tail)/.*/feed_forward/(up|down)/bias$", P()),
)
EXPERT_RULES = (
    (r"(groups|tail)/.*/moe/router/kernel$", P()),  # [G, D, E]
    (r"(groups|tail)/.*/moe/w_in$", P(None, "expert", "fsdp", None)),  # [G, E, D, F]
    (r"(groups|tail)/.*/moe/w_out$", P(None, "expert", None, "fsdp")),  # [G, E, F, D]
)
EXPERT_OUTPUT_BIAS_RULES = ((r"(groups|tail)/.*/moe/bias$", P()),)  # [G, D]
EXPERT_BIAS_RULES = ((r"(groups|tail)/.*/moe/bias_in$", P(None, "expert", None)),)  # [G, E, F]
LEARNED_POSITION_RULES = ((r"embeddings/position$", P()),)  # [positions, D]


def path_of(key_path) -> str:
    """`('a', 'b', 0)` key path of a pytree leaf -> `a/b/0`."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def is_array(node) -> bool:
    """Whether a node of parameters is one of them: an array, its abstract stand-in, or what is an
    array to the layers (models/int8_weight.py)."""
    return hasattr(node, "shape")


def rules_for(model) -> tuple[tuple[str, P], ...]:
    """The table of an encoder with configuration `model`: rules of the parts that it has."""
    parts = (
        (True, DENSE_RULES),
        (model.positions == "learned", LEARNED_POSITION_RULES),
        (
            model.num_moe_layers < model.num_layers or model.shared_expert_width > 0,
            FEED_FORWARD_RULES,
        ),
        (model.num_moe_layers > 0, EXPERT_RULES),
        (model.num_moe_layers > 0 and model.expert_bias, EXPERT_BIAS_RULES),
        (model.num_moe_layers > 0 and model.expert_output_bias, EXPERT_OUTPUT_BIAS_RULES),
    )
    return tuple(rule for present, rules in parts if present for rule in rules)


def specs(tree, rules) -> object:
    """PartitionSpecs of the leaves of `tree` (arrays or ShapeDtypeStructs), by path.

    Scalars are replicated without a rule. The pieces of an `Unstacked` parameter have their own.
    """
    used = set()

    def spec_of(key_path, leaf):
        path = path_of(key_path)
        if leaf.ndim == 0:
            return P()
        for index, (pattern, spec) in enumerate(rules):
            if re.search(pattern, path):
                used.add(index)
                return leaf.specs(spec) if isinstance(leaf, Unstacked) else spec
        raise UserError(f"parameter {path} {leaf.shape} matches no sharding rule in sharding.py")

    result = jax.tree_util.tree_map_with_path(spec_of, tree, is_leaf=is_array)
    unused = [pattern for index, (pattern, _) in enumerate(rules) if index not in used]
    if unused:
        raise UserError(f"sharding rule(s) that no parameter uses: {', '.join(unused)}")
    return result


def zero(path: str, shape: tuple[int, ...], spec: P, mesh) -> P:
    """`spec`, split over mesh axis `data` too: along the first axis that can be, whole or already
    split over `fsdp` (the scan axis of blocks is none). Where no axis can, `spec` as it is."""
    names = [*spec, *[None] * (len(shape) - len(spec))]
    first = 1 if re.search(r"(groups|tail)/", path) else 0
    for axis in range(first, len(shape)):
        taken = {None: (), "fsdp": ("fsdp",)}.get(names[axis])
        if taken is not None:
            pieces = math.prod(mesh.shape[name] for name in (*taken, "data"))
            if shape[axis] % pieces == 0:
                return P(*names[:axis], (*taken, "data"), *names[axis + 1 :])
    return spec


def shardings(params, rules, mesh, moments: bool = False) -> object:
    """NamedShardings of parameters on `mesh` (or an abstract one); with `moments` of the
    optimiser's moments instead. Checks that the mesh divides every sharded axis."""

    def named(key_path, leaf, spec):
        path = path_of(key_path)
        if moments and leaf.ndim:
            spec = zero(path, leaf.shape, spec, mesh)
        for axis, name in enumerate(spec):
            if isinstance(name, str) and leaf.shape[axis] % mesh.shape[name]:
                raise UserError(
                    f"axis {axis} of {path} {leaf.shape} is not divisible by mesh "
                    f"axis {name}={mesh.shape[name]}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(named, params, specs(params, rules), is_leaf=is_array)


def optimizer_shardings(optimizer, opt_state, params, rules, mesh) -> object:
    """NamedShardings of the state of an optax optimiser.

    Trees of moments are those that optax itself knows as copies of the parameters. What an
    optimiser keeps of a parameter in less space (Adafactor's rows and columns) is replicated, as
    are its counters.

    Raises:
      UserError: an array is as large as its parameter but has another shape, or has the shape of a
        parameter but is in no tree of moments; names it.
    """
    replicated = NamedSharding(mesh, P())

    def of_moment(leaf, param, sharding):
        if isinstance(
            leaf, optax.MaskedNode
        ):  # this part of the optimiser leaves the parameter out
            return leaf
        if leaf.shape == param.shape:
            return sharding
        return replicated if leaf.size < max(param.size, 2) else None

    def of_other(leaf):
        return None if leaf.ndim and leaf.shape in shapes else replicated

    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    of_params = shardings(params, rules, mesh, moments=True)
    try:
        placed = optax.tree_utils.tree_map_params(
            # Abstract: the devices of a plan cannot make the counters of a fresh state.
            lambda params: jax.eval_shape(optimizer.init, params),
            of_moment,
            opt_state,
            params,
            of_params,
            transform_non_params=of_other,
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )
    except (AttributeError, TypeError, ValueError):  # optax finds no tree of moments in this state
        placed = jax.tree.map(of_other, opt_state)

    def check(key_path, leaf, sharding):
        if sharding is None:
            raise UserError(
                f"optimiser state {path_of(key_path)} {leaf.shape} has no sharding: it is as large "
                "as a parameter, and optax knows no parameter of its shape behind it"
            )

    jax.tree_util.tree_map_with_path(check, opt_state, placed)
    return placed


def as_moments(grads, rules) -> object:
    """Gradients in the shardings of their moments: summed over devices once, each its part."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(grads, shardings(grads, rules, mesh, moments=True))


def gather(tree, tree_specs, axis: str, skip: int = 0) -> object:
    """Inside shard_map: the leaves, made whole along mesh axis `axis` where their spec has it.

    `skip`: leading axes of the specs that the leaves no longer have (a scan took them). The
    gradient is scattered the same way.
    """
    if jax.lax.axis_size(axis) == 1:
        return tree

    def whole(leaf, spec):
        for position, name in enumerate(spec):
            if name == axis:
                return jax.lax.all_gather(leaf, axis, axis=position - skip, tiled=True)
        return leaf

    return jax.tree.map(whole, tree, tree_specs)


def with_shardings(shapes, placed) -> object:
    """ShapeDtypeStructs of `shapes` in these shardings: what restore and compilation take."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        placed,
    )
