"""The experts' two matrix products and the activation between them, as TPU kernels.

Rows are sorted by expert, and each expert's rows start at a new tile (routing/sorted_tiles.py). A
tile therefore belongs to one expert. The expert's matrices stay in VMEM until the last of its tiles
is done. The hidden layer is activated, and its gradient taken, in VMEM too: as separate passes over
[S, F] these cost as much as a matrix product.

A program has one tile of s rows. F is cut only if an expert's matrices do not fit. Tiles behind the
last one in use do nothing, and their results are undefined.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_embed_jax.kernels.mxu import dot
from moe_embed_jax.kernels.tiles import Tiles, bias_gradient
from moe_embed_jax.mesh import vmem_limit_bytes

COLUMNS = 512  # of F at a time inside a program


@dataclasses.dataclass(frozen=True)
class ActivationMLP:
    """y = activation(x w_in + bias_in) w_out as a kernel of `routing.grouped`.

    Another expert MLP has its own class with these two methods. Weights are
    {"w_in": [E, D, F], "bias_in": [E, F] or None, "w_out": [E, F, D]}.
    """

    activation: Callable

    def forward(self, x_SD, weights, tiles: Tiles, interpret: bool, save: bool):
        """(y_SD of rows that are sorted by expert, what `backward` needs of it: nothing)."""
        del save
        arrays = weights["w_in"], weights["bias_in"], weights["w_out"]
        return forward(x_SD, *arrays, tiles, self.activation, interpret), None

    def backward(self, saved, x_SD, dy_SD, gate_S1, weights, tiles: Tiles, interpret: bool):
        """(dx_SD, dgate_S1 float32, dweights) of gate * y, given dy; computes the hidden layer
        again.

        The gradients of an expert without rows are undefined.
        """
        del saved
        arrays = w_in_EDF, bias_in_EF, _ = weights["w_in"], weights["bias_in"], weights["w_out"]
        experts = len(w_in_EDF)
        dx_SD, dpre_SF, hidden_SF, dgate_S1 = backward(
            x_SD, dy_SD, gate_S1, *arrays, tiles, self.activation, interpret
        )
        dbias_in_EF = None
        if bias_in_EF is not None:
            dbias_in_EF = bias_gradient(dpre_SF, tiles, experts).astype(bias_in_EF.dtype)
        return (
            dx_SD,
            dgate_S1,
            {
                "w_in": weight_gradient(x_SD, dpre_SF, experts, tiles, interpret),
                "bias_in": dbias_in_EF,
                "w_out": weight_gradient(hidden_SF, dy_SD, experts, tiles, interpret),
            },
        )


def forward(x_SD, w_in_EDF, bias_in_EF, w_out_EFD, tiles: Tiles, activation, interpret):
    """y_SD = activation(x w_in + bias) w_out."""
    (_, width), ffn, dtype = x_SD.shape, w_in_EDF.shape[2], x_SD.dtype
    grid = _ExpertGrid(tiles, width, ffn, dtype, interpret)
    inputs = [*grid.weights(w_in_EDF, bias_in_EF, w_out_EFD), (x_SD, grid.rows(width))]
    kernel = functools.partial(_forward_kernel, activation=activation)
    (y_SD,) = grid(kernel, inputs, [(width, dtype, grid.rows(width))], 2, "expert_forward")
    return y_SD


def _forward_kernel(
    expert_ref, last_ref, w_in_ref, bias_ref, w_out_ref, x_ref, y_ref, total_ref, *, activation
):
    part, parts = pl.program_id(1), pl.num_programs(1)

    @pl.when(pl.program_id(0) <= last_ref[0])
    def _():
        def add_columns(columns, y_sD):
            pre_sf = _before_activation(x_ref, w_in_ref, bias_ref, columns)
            return y_sD + dot(activation(pre_sf), w_out_ref[0, columns, :], 1, 0)

        zeros_sD = jnp.zeros(y_ref.shape, jnp.float32)
        y_sD = _over_columns(w_in_ref.shape[2], add_columns, zeros_sD)
        _add_up(total_ref, y_ref, y_sD, part, parts)


def backward(
    x_SD, dy_SD, gate_S1, w_in_EDF, bias_in_EF, w_out_EFD, tiles: Tiles, activation, interpret
):
    """Gradients of y = gate * forward(x), given dy; the hidden layer is computed again.

    Returns dx_SD, dpre_SF (of the hidden layer before activation), gate * hidden_SF (whose product
    with dy is the gradient of w_out), and dgate_S1 float32.
    """
    (_, width), ffn, dtype = dy_SD.shape, w_in_EDF.shape[2], dy_SD.dtype
    grid = _ExpertGrid(tiles, width, ffn, dtype, interpret)
    inputs = grid.weights(w_in_EDF, bias_in_EF, w_out_EFD)
    inputs += [(array, grid.rows(array.shape[1])) for array in (x_SD, dy_SD, gate_S1)]
    results = [
        (width, dtype, grid.rows(width)),
        (ffn, dtype, grid.hidden),
        (ffn, dtype, grid.hidden),
        (1, jnp.float32, grid.rows(1)),
    ]
    kernel = functools.partial(_backward_kernel, activation=activation)
    return grid(kernel, inputs, results, 3, "expert_backward")


def _backward_kernel(
    expert_ref,
    last_ref,
    w_in_ref,
    bias_ref,
    w_out_ref,
    x_ref,
    dy_ref,
    gate_ref,
    dx_ref,
    dpre_ref,
    hidden_ref,
    dgate_ref,
    total_ref,
    *,
    activation,
):
    part, parts = pl.program_id(1), pl.num_programs(1)

    @pl.when(pl.program_id(0) <= last_ref[0])
    def _():
        dtype = dy_ref.dtype

        def add_columns(columns, totals):
            dx_sD, dgate_s1 = totals
            pre_sf = _before_activation(x_ref, w_in_ref, bias_ref, columns)
            hidden_sf, activation_vjp = jax.vjp(activation, pre_sf)
            dhidden_sf = dot(dy_ref[...], w_out_ref[0, columns, :], 1, 1)
            dgate_s1 += jnp.sum(hidden_sf * dhidden_sf, axis=1, keepdims=True)
            (dpre_sf,) = activation_vjp((gate_ref[...] * dhidden_sf).astype(dtype))
            dpre_ref[:, columns] = dpre_sf
            hidden_ref[:, columns] = (gate_ref[...] * hidden_sf).astype(dtype)
            return dx_sD + dot(dpre_sf, w_in_ref[0, :, columns], 1, 1), dgate_s1

        nothing = tuple(jnp.zeros(ref.shape, jnp.float32) for ref in (dx_ref, dgate_ref))
        dx_sD, dgate_s1 = _over_columns(w_in_ref.shape[2], add_columns, nothing)
        _add_up(total_ref, dx_ref, dx_sD, part, parts)
        dgate_ref[...] = jnp.where(part == 0, 0.0, dgate_ref[...]) + dgate_s1


def _before_activation(x_ref, w_in_ref, bias_ref, columns):
    pre_sf = dot(x_ref[...], w_in_ref[0, :, columns], 1, 0)
    return (pre_sf + bias_ref[0, :, columns].astype(jnp.float32)).astype(x_ref.dtype)


def weight_gradient(x_SK, dy_SN, experts: int, tiles: Tiles, interpret):
    """Sum over each expert's rows of the outer products x dy, [E, K, N]; undefined for an expert
    without rows."""
    k, n = x_SK.shape[1], dy_SN.shape[1]
    # The sums of one part of an expert's matrix stay in VMEM over all of its tiles.
    k_part, n_part = (_divisor(size, limit) for size, limit in ((k, 1024), (n, 1024)))
    moved = x_SK.size * (n // n_part) * x_SK.dtype.itemsize
    moved += dy_SN.size * (k // k_part) * dy_SN.dtype.itemsize
    moved += experts * k * n * x_SK.dtype.itemsize

    def in_use(tile, refs):
        return jnp.minimum(tile, refs[1][0])

    return pl.pallas_call(
        _weight_gradient_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(k // k_part, n // n_part, len(tiles)),
            in_specs=[
                pl.BlockSpec((tiles.rows, k_part), lambda a, b, i, *refs: (in_use(i, refs), a)),
                pl.BlockSpec((tiles.rows, n_part), lambda a, b, i, *refs: (in_use(i, refs), b)),
            ],
            out_specs=pl.BlockSpec((1, k_part, n_part), lambda a, b, i, e, *_: (e[i], a, b)),
            scratch_shapes=[pltpu.VMEM((k_part, n_part), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((experts, k, n), x_SK.dtype),
        cost_estimate=pl.CostEstimate(
            flops=2 * tiles.expected * k * n, bytes_accessed=moved, transcendentals=0
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit_bytes(),
        ),
        interpret=interpret,
        name="expert_weight_gradient",
    )(tiles.expert_t, tiles.last_1, tiles.is_last_t, x_SK, dy_SN)


def _weight_gradient_kernel(expert_ref, last_ref, is_last_ref, x_ref, dy_ref, dw_ref, total_ref):
    tile = pl.program_id(2)
    is_first = (tile == 0) | (is_last_ref[jnp.maximum(tile - 1, 0)] == 1)

    @pl.when(tile <= last_ref[0])
    def _():
        total_KN = dot(x_ref[...], dy_ref[...], 0, 0)
        total_ref[...] = total_KN + jnp.where(is_first, 0.0, total_ref[...])

        @pl.when(is_last_ref[tile] == 1)
        def _():
            dw_ref[0] = total_ref[...].astype(dw_ref.dtype)


class _ExpertGrid:
    """A kernel over tiles of rows and parts of F: block shapes, cost, call."""

    def __init__(self, tiles: Tiles, width: int, ffn: int, dtype, interpret: bool):
        self.tiles, self.width, self.ffn, self.interpret = tiles, width, ffn, interpret
        # Both matrices of an expert, twice: the next expert's arrive while this one's multiply.
        bytes_of_column = 4 * width * jnp.dtype(dtype).itemsize
        self.part = _divisor(ffn, max(vmem_limit_bytes() // 2 // bytes_of_column, 1))
        self.hidden = pl.BlockSpec(
            (tiles.rows, self.part), lambda i, f, e, last: (jnp.minimum(i, last[0]), f)
        )

    def rows(self, columns: int) -> pl.BlockSpec:
        block = (self.tiles.rows, columns)
        return pl.BlockSpec(block, lambda i, f, e, last: (jnp.minimum(i, last[0]), 0))

    def weights(self, w_in_EDF, bias_in_EF, w_out_EFD) -> list:
        """The expert of a tile, and a bias of zero where there is none."""
        if bias_in_EF is None:
            bias_in_EF = jnp.zeros((len(w_in_EDF), self.ffn), w_in_EDF.dtype)
        part, width = self.part, self.width
        return [
            (w_in_EDF, pl.BlockSpec((1, width, part), lambda i, f, e, last: (e[i], 0, f))),
            (bias_in_EF[:, None], pl.BlockSpec((1, 1, part), lambda i, f, e, last: (e[i], 0, f))),
            (w_out_EFD, pl.BlockSpec((1, part, width), lambda i, f, e, last: (e[i], f, 0))),
        ]

    def __call__(self, kernel, inputs, results, products: int, name: str):
        """`inputs`: (array, spec). `results`: (columns, dtype, spec) of S rows. `products`: of a
        row with a matrix."""
        tiles, parts = self.tiles, self.ffn // self.part
        shapes = [
            jax.ShapeDtypeStruct((len(tiles) * tiles.rows, columns), dtype)
            for columns, dtype, _ in results
        ]
        moved = 0
        for array in (*(array for array, _ in inputs), *shapes):
            # Matrices come once per expert, or with every tile where they come in parts.
            times = len(tiles) / len(array) if array.ndim == 3 and parts > 1 else 1
            moved += int(array.size * array.dtype.itemsize * times)
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(len(tiles), parts),
                in_specs=[spec for _, spec in inputs],
                out_specs=[spec for _, _, spec in results],
                scratch_shapes=[pltpu.VMEM((tiles.rows, self.width), jnp.float32)],
            ),
            out_shape=shapes,
            cost_estimate=pl.CostEstimate(
                flops=products * 2 * tiles.expected * self.width * self.ffn,
                bytes_accessed=moved,
                transcendentals=tiles.expected * self.ffn,
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary", "arbitrary"),
                vmem_limit_bytes=vmem_limit_bytes(),
            ),
            interpret=self.interpret,
            name=name,
        )(tiles.expert_t, tiles.last_1, *(array for array, _ in inputs))


def _add_up(total_ref, out_ref, of_part, part, parts):
    """Sums over the parts of F in float32; the last part writes the result."""
    total = of_part + jnp.where(part == 0, 0.0, total_ref[...])
    total_ref[...] = total

    @pl.when(part == parts - 1)
    def _():
        out_ref[...] = total.astype(out_ref.dtype)


def _over_columns(size: int, body, start):
    """`body(columns, carry) -> carry` for all columns of the hidden layer, some at a time."""
    step = _divisor(size, COLUMNS)

    def visit(i, carry):
        return body(pl.ds(pl.multiple_of(i * step, step), step), carry)

    return jax.lax.fori_loop(0, size // step, visit, start)


def _divisor(size: int, limit: int) -> int:
    """The largest divisor of `size` up to `limit` that is a multiple of 128 lanes, or `size`."""
    if size <= limit or size % 128:
        return size
    limit = max(limit, 128)
    return max(part for part in range(128, limit + 1, 128) if size % part == 0)
