"""One table from parameter path to PartitionSpec.

It serves parameters, optimiser state (whose paths contain the parameter's path), checkpoint restore
and ahead-of-time compilation. The first rule that matches wins; a parameter without a rule, or a
rule that no parameter uses, is an error that names it: a silent default is how a renamed layer
ends up replicated on a pod.
"""

import re

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_embed_jax.errors import UserError

# Parameters inside `groups` have a leading scan axis (G), which is never sharded.
DENSE_RULES = (
    (r"embeddings/token$", P("fsdp", None)),  # [V, D]
    (r"embeddings/token_type$", P()),  # [1, D]
    (r"embeddings/norm/(scale|bias)$", P()),
    (r"groups/.*/attention/qkv/kernel$", P(None, "fsdp", None)),  # [G, D, 3D]
    (r"groups/.*/attention/out/kernel$", P(None, None, "fsdp")),  # [G, D, D]
    (r"groups/.*/attention/(qkv|out)/bias$", P()),
    (r"groups/.*/norm_\d/(scale|bias)$", P()),
)
FEED_FORWARD_RULES = (
    (r"groups/.*/feed_forward/up/kernel$", P(None, "fsdp", None)),  # [G, D, F]
    (r"groups/.*/feed_forward/down/kernel$", P(None, None, "fsdp")),  # [G, F, D]
    (r"groups/.*/feed_forward/(up|down)/bias$", P()),
)
EXPERT_RULES = (
    (r"groups/.*/moe/router/kernel$", P()),  # [G, D, E]
    (r"groups/.*/moe/w_in$", P(None, "expert", "fsdp", None)),  # [G, E, D, F]
    (r"groups/.*/moe/w_out$", P(None, "expert", None, "fsdp")),  # [G, E, F, D]
    (r"groups/.*/moe/bias$", P()),  # [G, D]
)


def path_of(key_path) -> str:
    """`('a', 'b', 0)` key path of a pytree leaf -> `a/b/0`."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def rules_for(moe_every: int) -> tuple[tuple[str, P], ...]:
    """The table of an encoder: `moe_every` 0 has no experts, 1 has no dense feed-forward."""
    return (
        DENSE_RULES
        + (FEED_FORWARD_RULES if moe_every != 1 else ())
        + (EXPERT_RULES if moe_every != 0 else ())
    )


def specs(tree, rules) -> object:
    """PartitionSpecs of the leaves of `tree` (arrays or ShapeDtypeStructs), by path.

    Scalars (step and optimiser counters) are replicated without a rule.
    """
    used = set()

    def spec_of(key_path, leaf):
        path = path_of(key_path)
        if leaf.ndim == 0:
            return P()
        for index, (pattern, spec) in enumerate(rules):
            if re.search(pattern, path):
                used.add(index)
                return spec
        raise UserError(f"parameter {path} {leaf.shape} matches no sharding rule in sharding.py")

    result = jax.tree_util.tree_map_with_path(spec_of, tree)
    unused = [pattern for index, (pattern, _) in enumerate(rules) if index not in used]
    if unused:
        raise UserError(f"sharding rule(s) that no parameter uses: {', '.join(unused)}")
    return result


def shardings(tree, rules, mesh: jax.sharding.Mesh) -> object:
    """NamedShardings of the leaves of `tree`; checks that the mesh divides every sharded axis."""

    def named(key_path, leaf, spec):
        for axis, name in enumerate(spec):
            if name is not None and leaf.shape[axis] % mesh.shape[name]:
                raise UserError(
                    f"axis {axis} of {path_of(key_path)} {leaf.shape} is not divisible by mesh "
                    f"axis {name}={mesh.shape[name]}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(named, tree, specs(tree, rules))


def with_shardings(shapes, rules, mesh: jax.sharding.Mesh) -> object:
    """ShapeDtypeStructs of `shapes` with their shardings: what restore and compilation take."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(shapes, rules, mesh),
    )
