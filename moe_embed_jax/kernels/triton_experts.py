"""The experts' two matrix products and the activation between them, as GPU kernels (Triton).

Rows are sorted by expert, and each expert's rows start at a new tile (routing/sorted_tiles.py). A
tile is multiplied by the matrix of one expert, and no kernel needs a mask. A layer has six kernels:
two products forward, two backward with the transposed matrices, and the gradients of two matrices.
Bias, activation, its slope and the gate are applied to a product's sums while these are in
registers: as passes of their own over [S, F] they cost as much as a product. Loops inside kernels
follow the rows that each expert really has, and the host waits for none of them.

Triton needs a GPU of compute capability 8.0 or more, and blocks whose sides are powers of two from
16 on. Other widths are filled up with zeros to a multiple of 16.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moe_embed_jax.kernels.tiles import Tiles, bias_gradient
from moe_embed_jax.kernels.triton_dot import dot
from moe_embed_jax.mesh import compute_capability

SMALLEST = 16  # side of a block


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What a program multiplies at a time: [rows, inner] by [inner, columns].

    columns: of the first product with its activation, and of the gradients of matrices.
    plain_columns: of plain products. slope_columns: where the activation's slope is computed, too,
    from a second block of rows x columns. inner_bytes: of the inner side. warps: of 32 threads
    each, which share rows x columns sums in float32. stages: steps along the inner side whose
    blocks are on their way from memory at a time.
    """

    rows: int
    columns: int
    plain_columns: int
    slope_columns: int
    inner_bytes: int
    warps: int
    stages: int


# Chosen by what the compiler reports, and not yet measured on a card. The sums stay in registers:
# in bfloat16 a thread spills 8 bytes on an H100, 0 on an A100, 20 on an L4, all in the kernel with
# the slope (with 128 columns, 620 on an A100). A program takes at most 144 of an H100's 227 KiB of
# shared memory, 48 of an A100's 163, and 32 of an L4's 99.
H100 = Blocks(128, 128, plain_columns=256, slope_columns=128, inner_bytes=128, warps=8, stages=3)
A100 = Blocks(128, 128, plain_columns=128, slope_columns=64, inner_bytes=64, warps=8, stages=4)
L4 = Blocks(64, 128, plain_columns=128, slope_columns=128, inner_bytes=64, warps=4, stages=3)


def blocks() -> Blocks:
    """For the GPUs of the mesh in context.

    H200 and B200 are computed as an H100, other cards (A10, RTX) as an L4, and interpreted kernels
    too.
    """
    capability = compute_capability()
    if capability == (8, 0):
        return A100
    return H100 if capability is not None and capability[0] in (9, 10) else L4


@dataclasses.dataclass(frozen=True)
class TritonMLP:
    """y = activation(x w_in + bias_in) w_out as a kernel of `routing.ragged`.

    Another expert MLP has a class of its own with these two methods. Weights are
    {"w_in": [E, D, F], "bias_in": [E, F] or None, "w_out": [E, F, D]}.

    activation_and_slope: float32 array -> (its activation, the activation's derivative there), in
      operations that Triton has; erf is not one of them.
    """

    activation_and_slope: Callable

    def forward(self, x_SD, weights, tiles: Tiles, interpret: bool, save: bool):
        """(y_SD of rows that are sorted by expert, what `backward` needs if `save`)."""
        width = x_SD.shape[1]
        x_SD, (w_in_EDF, bias_in_EF, w_out_EFD) = _fill(x_SD), _fill_weights(weights)
        grid = _Grid(tiles, w_in_EDF.shape[2], blocks().columns, interpret)
        kernel = functools.partial(
            _hidden_kernel,
            activation_and_slope=self.activation_and_slope,
            has_bias=bias_in_EF is not None,
        )
        inputs = [grid.rows(x_SD), _whole(w_in_EDF), *map(_whole, jax.tree.leaves(bias_in_EF))]
        results = [grid.result(x_SD.dtype)] * (2 if save else 1)
        *pre_SF, hidden_SF = grid.run(kernel, inputs, results, "expert_hidden")
        return _product(hidden_SF, w_out_EFD, False, tiles, interpret)[:, :width], pre_SF

    def backward(self, saved, x_SD, dy_SD, gate_S1, weights, tiles: Tiles, interpret: bool):
        """(dx_SD, dgate_S1 float32, dweights) of gate * y, given dy."""
        experts, width, ffn = weights["w_in"].shape
        x_SD, dy_SD = _fill(x_SD), _fill(dy_SD)
        w_in_EDF, bias_in_EF, w_out_EFD = _fill_weights(weights)
        (pre_SF,) = saved
        grid = _Grid(tiles, pre_SF.shape[1], blocks().slope_columns, interpret)
        kernel = functools.partial(
            _hidden_gradient_kernel, activation_and_slope=self.activation_and_slope
        )
        inputs = [grid.rows(dy_SD), _whole(w_out_EFD), grid.block(pre_SF), grid.rows(gate_S1)]
        result = grid.result(x_SD.dtype)
        dpre_SF, hidden_SF, dgate_nS = grid.run(
            kernel, inputs, [result, result, grid.sums_of_blocks()], "expert_hidden_gradient"
        )
        dx_SD = _product(dpre_SF, w_in_EDF, True, tiles, interpret)[:, :width]
        dbias_in_EF = None
        if bias_in_EF is not None:
            dbias_in_EF = bias_gradient(dpre_SF, tiles, experts)[:, :ffn].astype(bias_in_EF.dtype)
        gradient = functools.partial(_weight_gradient, experts, tiles, interpret)
        dweights = {
            "w_in": gradient(x_SD, dpre_SF)[:, :width, :ffn],
            "bias_in": dbias_in_EF,
            "w_out": gradient(hidden_SF, dy_SD)[:, :ffn, :width],
        }
        return dx_SD, dgate_nS.sum(axis=0)[:, None], dweights


def _product(x_SK, w_E, transposed: bool, tiles: Tiles, interpret: bool):
    """y_SN: each tile by the matrix of its expert, [E, K, N], or [E, N, K] if `transposed`."""
    columns = w_E.shape[1 if transposed else 2]
    grid = _Grid(tiles, columns, blocks().plain_columns, interpret)
    kernel = functools.partial(_product_kernel, transposed=transposed)
    inputs = [grid.rows(x_SK), _whole(w_E)]
    return grid.run(kernel, inputs, [grid.result(x_SK.dtype)], "expert_product")[0]


def _product_kernel(place, x_ref, w_ref, y_ref, *, transposed):
    y_ref[...] = _sums(place, x_ref, w_ref, transposed).astype(y_ref.dtype)


def _hidden_kernel(place, x_ref, w_ref, *refs, activation_and_slope, has_bias):
    sums_sf = _sums(place, x_ref, w_ref, False)
    if has_bias:
        bias_ref, *refs = refs
        sums_sf += bias_ref[place.expert, place.columns].astype(jnp.float32)[None]
    *pre_ref, hidden_ref = refs
    pre_sf = sums_sf.astype(hidden_ref.dtype)
    for ref in pre_ref:
        ref[...] = pre_sf
    hidden_sf, _ = activation_and_slope(pre_sf.astype(jnp.float32))
    hidden_ref[...] = hidden_sf.astype(hidden_ref.dtype)


def _hidden_gradient_kernel(
    place,
    dy_ref,
    w_ref,
    pre_ref,
    gate_ref,
    dpre_ref,
    hidden_ref,
    dgate_ref,
    *,
    activation_and_slope,
):
    dhidden_sf, gate_s1 = _sums(place, dy_ref, w_ref, True), gate_ref[...]
    hidden_sf, slope_sf = activation_and_slope(pre_ref[...].astype(jnp.float32))
    hidden_ref[...] = (gate_s1 * hidden_sf).astype(hidden_ref.dtype)
    dgate_ref[...] = jnp.sum(hidden_sf * dhidden_sf, axis=1)
    dpre_ref[...] = (slope_sf * (gate_s1 * dhidden_sf)).astype(dpre_ref.dtype)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Of a program: its expert, and its columns in the result; `inner` values are added at a
    time."""

    expert: jax.Array
    columns: pl.Slice
    inner: int


def _sums(place: _Place, x_ref, w_ref, transposed: bool):
    """The block of x w in float32."""
    (rows, size), step = x_ref.shape, place.inner

    def add(i, sums_sn):
        inner = pl.ds(i * step, step)
        if transposed:
            return sums_sn + dot(x_ref[:, inner], w_ref[place.expert, place.columns, inner], 1, 1)
        return sums_sn + dot(x_ref[:, inner], w_ref[place.expert, inner, place.columns], 1, 0)

    start_sn = jnp.zeros((rows, place.columns.size), jnp.float32)
    return jax.lax.fori_loop(0, size // step, add, start_sn)


class _Grid:
    """Programs over blocks of columns and tiles of rows of a result [S, N].

    Blocks of one tile run together: they share its rows and the expert's matrix in the cache.
    """

    def __init__(self, tiles: Tiles, columns: int, at_a_time: int, interpret: bool):
        self.tiles, self.interpret, self.blocks = tiles, interpret, blocks()
        self.columns, self.part = columns, _side(columns, at_a_time)
        self.slots = len(tiles) * tiles.rows
        self.block_spec = pl.BlockSpec((tiles.rows, self.part), lambda part, tile: (tile, part))

    def rows(self, array_SX):
        """An input of which a program has the rows of its tile."""
        shape = (self.tiles.rows, array_SX.shape[1])
        return array_SX, pl.BlockSpec(shape, lambda part, tile: (tile, 0))

    def block(self, array_SN):
        """An input of which a program has the block that it has of the result."""
        return array_SN, self.block_spec

    def result(self, dtype):
        return jax.ShapeDtypeStruct((self.slots, self.columns), dtype), self.block_spec

    def sums_of_blocks(self):
        """A result of one number for each row of a block, float32 [parts of N, S]."""
        shape = (self.columns // self.part, self.slots)
        spec = pl.BlockSpec((None, self.tiles.rows), lambda part, tile: (part, tile))
        return jax.ShapeDtypeStruct(shape, jnp.float32), spec

    def run(self, kernel, inputs, results, name: str):
        """The results, undefined in tiles that are not in use. `inputs` begin with the rows x."""
        part, step = self.part, _inner(inputs[0][0], self.blocks)

        def program(expert_ref, last_ref, *refs):
            column, tile = pl.program_id(0) * part, pl.program_id(1)

            @pl.when(tile <= last_ref[0])
            def _():
                kernel(_Place(expert_ref[tile], pl.ds(column, part), step), *refs)

        return pl.pallas_call(
            program,
            grid=(self.columns // part, len(self.tiles)),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2 + [spec for _, spec in inputs],
            out_specs=[spec for _, spec in results],
            out_shape=[shape for shape, _ in results],
            compiler_params=_params(self.blocks),
            interpret=self.interpret,
            name=name,
        )(self.tiles.expert_t, self.tiles.last_1, *(array for array, _ in inputs))


def _weight_gradient(experts: int, tiles: Tiles, interpret: bool, x_SK, dy_SN):
    """Sum over each expert's rows of the outer products x dy, [E, K, N]; zero without rows."""
    (_, k), n, of_card = x_SK.shape, dy_SN.shape[1], blocks()
    k_part, n_part = _side(k, of_card.columns), _side(n, of_card.columns)
    step = min(_inner(x_SK, of_card), tiles.rows)
    in_use_t = jnp.arange(len(tiles)) <= tiles.last_1
    of_expert_Et = (tiles.expert_t == jnp.arange(experts)[:, None]) & in_use_t
    steps_E = jnp.sum(of_expert_Et, axis=1) * (tiles.rows // step)
    end_E = jnp.cumsum(steps_E)

    def program(first_ref, end_ref, x_ref, dy_ref, dw_ref):
        k_columns, n_columns = (
            pl.ds(pl.program_id(i) * part, part) for i, part in enumerate((k_part, n_part))
        )

        def add(i, dw_kn):
            rows = pl.ds(i * step, step)
            return dw_kn + dot(x_ref[rows, k_columns], dy_ref[rows, n_columns], 0, 0)

        expert = pl.program_id(2)
        start_kn = jnp.zeros((k_part, n_part), jnp.float32)
        dw_kn = jax.lax.fori_loop(first_ref[expert], end_ref[expert], add, start_kn)
        dw_ref[...] = dw_kn.astype(dw_ref.dtype)

    return pl.pallas_call(
        program,
        grid=(k // k_part, n // n_part, experts),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 4,
        out_specs=pl.BlockSpec((None, k_part, n_part), lambda a, b, expert: (expert, a, b)),
        out_shape=jax.ShapeDtypeStruct((experts, k, n), x_SK.dtype),
        compiler_params=_params(of_card),
        interpret=interpret,
        name="expert_weight_gradient",
    )((end_E - steps_E).astype(jnp.int32), end_E.astype(jnp.int32), x_SK, dy_SN)


def _params(of_card: Blocks) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=of_card.warps, num_stages=of_card.stages)


def _whole(array):
    """An input of which a program chooses its block itself."""
    return array, pl.BlockSpec(memory_space=pl.ANY)


def _side(size: int, most: int) -> int:
    """The largest power of two that divides `size`, but `most` at most."""
    return min(most, size & -size)


def _inner(x_SK, of_card: Blocks) -> int:
    return _side(x_SK.shape[1], of_card.inner_bytes // x_SK.dtype.itemsize)


def _fill(array, axes=(1,)):
    """`array` with zeros up to a multiple of `SMALLEST` along `axes`."""
    missing = [-size % SMALLEST if i in axes else 0 for i, size in enumerate(array.shape)]
    return jnp.pad(array, [(0, n) for n in missing]) if any(missing) else array


def _fill_weights(weights):
    """(w_in_EDF, bias_in_EF or None, w_out_EFD), filled up."""
    bias_in_EF = weights["bias_in"]
    return (
        _fill(weights["w_in"], (1, 2)),
        None if bias_in_EF is None else _fill(bias_in_EF),
        _fill(weights["w_out"], (1, 2)),
    )
