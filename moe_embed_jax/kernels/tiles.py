"""Tiles of rows that are sorted by expert, which the kernels of both processors take."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Tiles:
    """Which expert each tile of s rows belongs to.

    expert_t: int32; tiles that are not in use repeat the last one. last_1: number of the last tile
    in use. is_last_t: 1 where an expert's last tile is.
    rows: s. expected: how many rows are in use, on average, for cost estimates.
    """

    expert_t: jax.Array
    last_1: jax.Array
    is_last_t: jax.Array
    rows: int = dataclasses.field(metadata=dict(static=True))
    expected: int = dataclasses.field(metadata=dict(static=True))

    def __len__(self) -> int:
        return len(self.expert_t)


def bias_gradient(dpre_SF, tiles: Tiles, experts: int):
    """Sum over each expert's rows, [E, F] float32."""
    in_use_t = jnp.arange(len(tiles)) <= tiles.last_1
    dpre_tsF = dpre_SF.reshape(len(tiles), tiles.rows, -1).astype(jnp.float32)
    of_tile_tF = jnp.where(in_use_t[:, None, None], dpre_tsF, 0).sum(axis=1)
    return jax.ops.segment_sum(of_tile_tF, tiles.expert_t, experts)
