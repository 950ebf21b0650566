"""Dropless expert layer for TPU: assignments sorted by expert, multiplied by grouped matmuls.

The matmuls are megablox's Pallas kernels (MegaBlocks, arXiv 2211.15841), whose work follows the
number of rows that each expert really has. Two traps: rows behind the last group (padding) come
back as whatever was in memory, NaN included, in gradients too; and one tiling does not fit all six
products of a layer. Hence a VJP of our own, around the kernels. Tokens are put in order, and back,
by gathers in both directions (scatters are slow on TPU), and a gather past the end reads zero: that
is what padding gets, so that the rows behind the last group are never read, forward or backward.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from moe_embed_jax.mesh import platform
from moe_embed_jax.routing.rows import sum_choices, take

TILE_ROWS = 512  # of sorted assignments
TILE_BYTES = 2048  # of a row of a tile: 1,024 columns of bfloat16; six tiles fit 16 MB of VMEM


def grouped(
    x_TD, expert_TK, gate_TK, w_in_EDF, bias_in_EF, w_out_EFD, activation
) -> tuple[jax.Array, jax.Array]:
    """The signature and result of `reference.reference`. Off TPU the kernels are interpreted:
    right, and slow."""
    args = (x_TD, expert_TK, gate_TK, w_in_EDF, bias_in_EF, w_out_EFD)
    return _grouped(*args, activation, platform() != "tpu"), jnp.zeros((), jnp.float32)


def _tile_rows(assignments: int) -> int:
    return min(TILE_ROWS, max(16, 1 << (assignments - 1).bit_length()))


def _order(expert_TK, experts: int):
    """How assignments are sorted by expert; those without one (`experts`) come last.

    Returns `assignment_S` (row -> flat assignment; past the end for rows without an expert),
    `row_A` (its inverse; past the end alike) and the rows of each expert `rows_E`.
    """
    expert_A = expert_TK.reshape(-1)
    assignments = expert_A.shape[0]
    tile = _tile_rows(assignments)
    rows = -(-assignments // tile) * tile
    # Experts before assignments: the long axis lies along the lanes of a TPU.
    is_for_EA = (expert_A == jnp.arange(experts)[:, None]).astype(jnp.int32)
    rows_E = is_for_EA.sum(axis=1)
    first_E = jnp.cumsum(rows_E) - rows_E
    place_EA = first_E[:, None] + jnp.cumsum(is_for_EA, axis=1) - 1
    row_A = jnp.sum(is_for_EA * place_EA, axis=0)
    row_A = jnp.where(expert_A < experts, row_A, rows)
    sorted_A = jnp.argsort(expert_A, stable=True)
    assignment_S = jnp.pad(sorted_A, (0, rows - assignments), constant_values=assignments)
    assignment_S = jnp.where(jnp.arange(rows) < rows_E.sum(), assignment_S, assignments)
    return assignment_S, row_A, rows_E


def _in_order(array_AX, index_S):
    """Rows of `array` as they are sorted; rows without an expert, which nobody reads, get any."""
    return array_AX.at[index_S].get(mode="clip")


def _tiles(rows: int, k: int, n: int, dtype) -> tuple[int, int, int]:
    columns = TILE_BYTES // jnp.dtype(dtype).itemsize
    return _tile_rows(rows), min(k, columns), min(n, columns)


def _multiply(x_SK, w_EKN, rows_E, interpret, transpose=False):
    """x @ w[expert of the row] (or its transpose); undefined for rows without an expert."""
    k, n = w_EKN.shape[1:][::-1] if transpose else w_EKN.shape[1:]
    return gmm(
        x_SK,
        w_EKN,
        rows_E,
        x_SK.dtype,
        _tiles(len(x_SK), k, n, x_SK.dtype),
        transpose_rhs=transpose,
        interpret=interpret,
    )


def _weight_gradient(x_SK, dy_SN, rows_E, interpret):
    """Sum over an expert's rows of the outer products x dy, [E, K, N]."""
    tiles = _tiles(len(x_SK), x_SK.shape[1], dy_SN.shape[1], jnp.float32)
    dw_EKN = tgmm(x_SK.swapaxes(0, 1), dy_SN, rows_E, jnp.float32, tiles, interpret=interpret)
    return jnp.where(rows_E[:, None, None] > 0, dw_EKN, 0).astype(x_SK.dtype)


def _row_experts(rows_E, rows: int):
    """One-hot expert of each sorted row, [S, E] float32; zero for rows without one."""
    end_E = jnp.cumsum(rows_E)
    row_S1 = jnp.arange(rows)[:, None]
    return ((row_S1 >= end_E - rows_E) & (row_S1 < end_E)).astype(jnp.float32)


def _forward(x_TD, expert_TK, gate_TK, w_in_EDF, bias_in_EF, w_out_EFD, activation, interpret):
    order = assignment_S, row_A, rows_E = _order(expert_TK, len(w_in_EDF))
    x_SD = _in_order(x_TD, assignment_S // expert_TK.shape[1])
    pre_SF = _multiply(x_SD, w_in_EDF, rows_E, interpret)
    if bias_in_EF is not None:
        bias_SF = _row_experts(rows_E, len(pre_SF)) @ bias_in_EF.astype(jnp.float32)
        pre_SF += bias_SF.astype(pre_SF.dtype)
    y_SD = _multiply(activation(pre_SF), w_out_EFD, rows_E, interpret)
    return sum_choices(y_SD, row_A.reshape(gate_TK.shape), gate_TK), (pre_SF, y_SD, order)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _grouped(x_TD, expert_TK, gate_TK, w_in_EDF, bias_in_EF, w_out_EFD, activation, interpret):
    args = (x_TD, expert_TK, gate_TK, w_in_EDF, bias_in_EF, w_out_EFD)
    return _forward(*args, activation, interpret)[0]


def _grouped_fwd(x_TD, expert_TK, gate_TK, w_in_EDF, bias_in_EF, w_out_EFD, activation, interpret):
    args = (x_TD, expert_TK, gate_TK, w_in_EDF, bias_in_EF, w_out_EFD)
    y_TD, saved = _forward(*args, activation, interpret)
    return y_TD, (args, saved)


def _grouped_bwd(activation, interpret, residuals, dy_TD):
    (x_TD, expert_TK, gate_TK, w_in_EDF, bias_in_EF, w_out_EFD), saved = residuals
    pre_SF, y_SD, (assignment_S, row_A, rows_E) = saved
    token_S = assignment_S // expert_TK.shape[1]
    x_SD, dy_SD = _in_order(x_TD, token_S), _in_order(dy_TD, token_S)
    gate_S1 = _in_order(gate_TK.reshape(-1), assignment_S)[:, None].astype(x_TD.dtype)
    # y and dy are narrower than the hidden layer: the cheapest place for the gate's gradient.
    dgate_S = jnp.sum(y_SD.astype(jnp.float32) * dy_SD.astype(jnp.float32), axis=-1)
    dy_SD = gate_S1 * dy_SD
    hidden_SF, activation_vjp = jax.vjp(activation, pre_SF)
    dhidden_SF = _multiply(dy_SD, w_out_EFD, rows_E, interpret, transpose=True)
    (dpre_SF,) = activation_vjp(dhidden_SF)
    dw_out_EFD = _weight_gradient(hidden_SF, dy_SD, rows_E, interpret)
    dw_in_EDF = _weight_gradient(x_SD, dpre_SF, rows_E, interpret)
    dbias_in_EF = None
    if bias_in_EF is not None:
        experts_SE = _row_experts(rows_E, len(dpre_SF))
        defined_SF = jnp.where(experts_SE.any(axis=1)[:, None], dpre_SF.astype(jnp.float32), 0)
        dbias_in_EF = (experts_SE.T @ defined_SF).astype(bias_in_EF.dtype)
    dx_SD = _multiply(dpre_SF, w_in_EDF, rows_E, interpret, transpose=True)
    dx_TD = sum_choices(dx_SD, row_A.reshape(gate_TK.shape), jnp.ones_like(gate_TK))
    dgate_TK = take(dgate_S, row_A).reshape(gate_TK.shape).astype(gate_TK.dtype)
    return dx_TD, None, dgate_TK, dw_in_EDF, dbias_in_EF, dw_out_EFD


_grouped.defvjp(_grouped_fwd, _grouped_bwd)
