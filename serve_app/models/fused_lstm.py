"""LSTM layers as one kernel of our own, for NVIDIA GPUs of compute capability 9.0.

A cell (layer, t) needs the cells (layer - 1, t) and (layer, t - 1), so those on a diagonal layer + t = d do not need
each other. The kernel walks the diagonals. A cell is a grid of tiles, and a tile is the product

    [input of the layer, h of t - 1] @ [weight_ih, weight_hh]^T    rows: sessions; columns: gates of hidden units

whose columns are ordered such that one thread ends up with all four gates of a unit and can go on to c and h.

The grid has one block for each multiprocessor; block p takes the tiles p, p + blocks, ... of the list of all tiles,
which is in the order of the diagonals. A tile waits until those it needs are done: `ready` counts them, for each cell
and block of rows. They come earlier in the list and every block runs (a cooperative launch), so no tile waits for ever;
and where a diagonal has more than two cells, they were done long ago. In a block one warp loads with the tensor memory
accelerator, one or two warpgroups multiply, 64 rows each, and one warp counts what they have stored.

With weights in FP8, h goes from cell to cell in FP8 too, so these products run at twice the rate; x, its weights, the
state between steps and the outputs stay as they are.
"""

# mypy: ignore-missing-imports, allow-untyped-decorators

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from serve_app.models import fp8
from serve_app.models.interface import State
from serve_app.models.options import RnnOptions
from serve_app.models.rnn import Rnn

ROWS = 64  # of sessions, that one warpgroup multiplies
DEPTH_BYTES = 128  # of both operands, that one load brings: as wide as the swizzle
DEPTH = DEPTH_BYTES // 2  # columns of 16 bits
UNITS = 32  # whose gates lie together in the packed weights, as 128 rows
MAX_OUTPUTS = 4096  # of which our top-k finds the largest: one warp holds them all in registers
MAX_TOP_K = 32  # it takes so many turns
H_SCALE = 16  # of h in FP8, which is at most 1: steps of 2**-13 near 0
MAX_INPUT_WEIGHT = 2**14  # of x, scaled as those of h in FP8, in 16 bits


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the work is cut: `warpgroups` of 64 rows, `columns` (gates of columns / 4 units), `stages` of loads ahead."""

    warpgroups: int
    columns: int
    stages: int
    cost: float
    """Time that a tile takes, measured, in that of the first of TILES."""

    def count(self, hidden: int, batch: int) -> int:
        """Tiles of a cell."""
        return -(-batch // (ROWS * self.warpgroups)) * 4 * hidden // self.columns


TILES = (Tiles(2, 256, 4, 1.0), Tiles(2, 128, 6, 0.56), Tiles(1, 128, 8, 0.4))


@lru_cache(maxsize=1024)
def tiles_for(layers: int, hidden: int, timesteps: int, batch: int, blocks: int) -> Tiles:
    """The fastest for so many blocks: large tiles load less for each product, small ones keep more blocks busy."""
    diagonals = range(layers + timesteps - 1)
    cells = [min(d, layers - 1) - max(d - timesteps + 1, 0) + 1 for d in diagonals]
    return min(
        TILES, key=lambda tiles: tiles.cost * sum(max(1, n * tiles.count(hidden, batch) / blocks) for n in cells)
    )


class FusedLstm:
    """The forward of an `Rnn` of LSTM layers, and `in_slots`; head and top-k as there.

    It holds weights of its own: packed, so those of `model` may change without effect. Kernels compile at their first
    use, so call it once, with the same shapes, before a capture into a CUDA graph. c is rounded to the dtype of the
    state at every timestep.
    """

    def __init__(self, model: Rnn) -> None:
        """`model` lies on the device where this will run, and `supports` has said yes."""
        options = model.options
        self.model = model
        device = next(model.parameters()).device
        layers, hidden, input_depth = options.layers, options.hidden, _up(options.input, DEPTH)
        # [layers, gates, units, h of the layer below | h]; sigmoid(v) is (1 + tanh(v / 2)) / 2: the half goes in here
        half = torch.tensor([0.5, 0.5, 1.0, 0.5], device=device).view(4, 1, 1)  # gates in torch's order: i, f, g, o
        weights = torch.zeros(layers, 4, hidden, 2 * hidden, dtype=model.dtype, device=device)
        x_weights = torch.zeros(4, hidden, input_depth, dtype=model.dtype, device=device)
        bias = torch.zeros(layers, 4, hidden, device=device)
        for layer, (w_ih, w_hh, b_ih, b_hh) in enumerate(model.rnn.all_weights):
            of_input = weights[layer, :, :, :hidden] if layer else x_weights[:, :, : options.input]
            of_input.copy_(half * w_ih.view(4, hidden, -1))
            weights[layer, :, :, hidden:] = half * w_hh.view(4, hidden, hidden)
            bias[layer] = half[..., 0] * (b_ih.float() + b_hh.float()).view(4, hidden)
        #: What sums of products are multiplied by, [layers, gates, units]; with weights of 16 bits nothing.
        self._scales: torch.Tensor | None = None
        if options.quantization == "fp8":
            scales = fp8.scales(weights)
            fits = MAX_INPUT_WEIGHT / x_weights.float().abs().amax(-1, keepdim=True).clamp(min=2**-14)
            scales[0] = torch.minimum(scales[0], (fits / H_SCALE).log2().floor().exp2())
            weights = (weights.float() * scales).to(fp8.DTYPE)
            x_weights = (x_weights.float() * scales[0] * H_SCALE).to(model.dtype)
            self._scales = 1 / (scales[..., 0] * H_SCALE)
        self._weights, self._x_weights = _packed(weights), _packed(x_weights[None])
        self._bias = bias
        self._orders: dict[int, torch.Tensor] = {}
        self._input_steps = input_depth // DEPTH
        self._h_scale = 1 if self._scales is None else H_SCALE
        self._multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count

    @staticmethod
    def supports(options: RnnOptions, device: torch.device) -> bool:
        """Whether a model of these options can run so on that device."""
        return (
            device.type == "cuda"
            and torch.cuda.get_device_capability(device) == (9, 0)
            and options.cell == "lstm"
            and options.dtype in ("fp16", "bf16")
            and not options.projection
            and options.hidden % (128 if options.quantization == "fp8" else 64) == 0
            and options.input % 8 == 0  # rows of x start at multiples of 16 bytes
        )

    def __call__(self, x: torch.Tensor, state: State) -> tuple[torch.Tensor | Mapping[str, torch.Tensor], State]:
        """x [T, B, input], (h, c) [layers, B, hidden] -> as `Rnn.forward`."""
        with torch.cuda.device(x.device):
            y, state = self.layers(x.to(self.model.dtype), state)
            specs = self.model.outputs
            dtypes = (getattr(torch, spec.dtype) for spec in specs.values())
            outputs = [
                x.new_empty(*x.shape[:2], *spec.shape, dtype=dtype)
                for spec, dtype in zip(specs.values(), dtypes, strict=True)
            ]
            self._head(y, outputs)
            return (dict(zip(specs, outputs, strict=True)) if len(outputs) > 1 else outputs[0]), state

    def in_slots(
        self,
        x: torch.Tensor,
        states: State,
        slots: torch.Tensor,
        outputs: Sequence[torch.Tensor],
        spare: int = 0,
    ) -> None:
        """x [T, B, input], states (h, c) [layers, slots, hidden], slots [B]: the states in these slots go on.

        outputs: y or values and indices, [T, B, ...], are written there. spare: multiprocessors left to others.
        """
        with torch.cuda.device(x.device):
            h, c = states
            self._head(self._run(x.to(self.model.dtype), None, h, c, slots, spare), outputs)

    def layers(self, x: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        """x [T, B, input] -> h of the last layer [T, B, hidden], state after T."""
        h_0, c_0 = (_aligned(leaf) for leaf in state)
        h_n, c_n = torch.empty_like(h_0), c_0.clone()
        return self._run(x, h_0, h_n, c_n, self._in_order(x.shape[1])), (h_n, c_n)

    def _in_order(self, batch: int) -> torch.Tensor:
        if batch not in self._orders:
            self._orders[batch] = torch.arange(batch, device=self._bias.device)
        return self._orders[batch]

    def _head(self, h: torch.Tensor, outputs: Sequence[torch.Tensor]) -> None:
        y = self.model.head(h)
        if self.model.options.top_k:
            top_k(y, *outputs)
        else:
            outputs[0].copy_(y)

    def _run(
        self,
        x: torch.Tensor,
        h_0: torch.Tensor | None,
        h_n: torch.Tensor,
        c: torch.Tensor,
        slots: torch.Tensor,
        spare: int = 0,
    ) -> torch.Tensor:
        """h of the last layer [T, B, hidden], from h_0 [layers, B, hidden], or else from what is in `slots` of h_n.

        h after T goes to `slots` of h_n [layers, num_slots, hidden], and c goes on in those of c.
        """
        (num_timesteps, batch, depth), (layers, num_slots, hidden) = x.shape, c.shape
        by_session = x.transpose(0, 1)
        if by_session.is_contiguous() and by_session.data_ptr() % 16 == 0 and depth % DEPTH == 0:
            x, x_rows, x_steps = by_session.reshape(batch, -1), 0, depth // DEPTH  # from one timestep to the next
        else:
            x, x_rows, x_steps = _aligned(x), batch, 0
        h = x.new_empty(layers, num_timesteps, batch, hidden, dtype=self._weights.dtype)
        y = h[-1] if self._scales is None else x.new_empty(num_timesteps, batch, hidden)
        most = self._multiprocessors - spare
        tiles = tiles_for(layers, hidden, num_timesteps, batch, most)
        row_blocks = -(-batch // (ROWS * tiles.warpgroups))
        ready = torch.empty(layers, num_timesteps, row_blocks, dtype=torch.int32, device=x.device)
        if h_0 is None:
            h_0 = h.new_empty(layers, batch, hidden)
            _begin[(batch, layers)](
                h_n, slots, h_0, ready, ready.numel(), num_slots, hidden, HIDDEN=triton.next_power_of_2(hidden),
                SCALE=self._h_scale,
            )  # fmt: skip
        else:
            ready.zero_()
            h_0 = (h_0 * self._h_scale).to(h.dtype)
        blocks = min(most, layers * num_timesteps * tiles.count(hidden, batch))
        _lstm[(blocks,)](
            _matrix(x, ROWS),
            _matrix(h_0, ROWS),
            _matrix(h, ROWS),
            _matrix(self._weights, tiles.columns),
            _matrix(self._x_weights, tiles.columns),
            self._bias,
            self._bias if self._scales is None else self._scales,
            c,
            h,
            y,
            h_n,
            slots,
            ready,
            num_timesteps,
            batch,
            row_blocks,
            num_slots,
            x_rows,
            x_steps,
            LAYERS=layers,
            HIDDEN=hidden,
            INPUT_STEPS=self._input_steps,
            WARPGROUPS=tiles.warpgroups,
            STAGES=tiles.stages,
            H_SCALE=self._h_scale,
            num_warps=4,
            launch_cooperative_grid=True,
        )
        return y


def top_k(y: torch.Tensor, values: torch.Tensor, indices: torch.Tensor) -> None:
    """Write the k largest of y [T, B, outputs] of 16 bits, largest first, and where they are; of equals, the first.

    values and indices (int32) are [T, B, k], ordered in any way but for the last dimension.
    """
    (num_timesteps, batch, outputs), k = y.shape, values.shape[-1]
    if k > MAX_TOP_K or outputs > MAX_OUTPUTS:
        found = y.topk(k)
        values.copy_(found.values)
        indices.copy_(found.indices)
    else:
        _top_k[(batch, num_timesteps)](
            y.contiguous(), values, indices, *values.stride()[:2], *indices.stride()[:2], outputs, k,
            OUTPUTS=max(triton.next_power_of_2(outputs), 32), num_warps=1,
        )  # fmt: skip


def _packed(weights: torch.Tensor) -> torch.Tensor:
    """[layers, gates, units, columns] -> [layers * gates * units, columns], in the order of the kernel's rows.

    A thread of the accumulator's layout has 2 of every 8 columns, those at 2 * lane: what becomes columns is ordered
    unit % 8, gate // 2, lane, gate % 2 so that these are the gates of the 8 units at 8 * lane.
    """
    layers, _, hidden, columns = weights.shape
    parts = weights.view(
        layers, 2, 2, hidden // UNITS, 4, 8, columns
    )  # gate // 2, gate % 2, unit // 32, lane, unit % 8
    return parts.permute(0, 3, 5, 1, 4, 2, 6).reshape(-1, columns).contiguous()


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy that a descriptor can be made of."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _matrix(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    """A contiguous tensor as a matrix of which one load brings `rows` x DEPTH_BYTES."""
    nbytes = tensor.element_size()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=DEPTH_BYTES, element_bitwidth=8 * nbytes, rank=2)
    return TensorDescriptor.from_tensor(tensor.view(-1, tensor.shape[-1]), [rows, DEPTH_BYTES // nbytes], layout)


@gluon.constexpr_function
def _units_layout(units: int) -> Any:
    """[ROWS, units] as threads have it after the product: rows r and r + 8, units 8 * lane + 0..7 of every UNITS."""
    registers = [[0, 1], [0, 2], [0, 4], *([[0, UNITS]] if units > UNITS else []), [8, 0]]
    lanes, warps = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [ROWS, units])


@gluon.jit(do_not_specialize=["timesteps", "batch", "row_blocks", "num_slots", "x_rows", "x_steps"])
def _lstm(
    x: tma.tensor_descriptor,
    h_0: tma.tensor_descriptor,
    h: tma.tensor_descriptor,
    weights: tma.tensor_descriptor,
    x_weights: tma.tensor_descriptor,
    bias: gl.tensor,
    scales: gl.tensor,
    c: gl.tensor,
    h_out: gl.tensor,
    y: gl.tensor,
    h_n: gl.tensor,
    slots: gl.tensor,
    ready: gl.tensor,
    timesteps: gl.tensor,
    batch: gl.tensor,
    row_blocks: gl.tensor,
    num_slots: gl.tensor,
    x_rows: gl.tensor,
    x_steps: gl.tensor,
    LAYERS: gl.constexpr,
    HIDDEN: gl.constexpr,
    INPUT_STEPS: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    H_SCALE: gl.constexpr,
) -> None:
    """h_0 [layers * B, hidden], h [layers * T * B, hidden], which is also h_out; `ready` all zero.

    H_SCALE: h_0, h and weights are in FP8, h_0 and h are that many times what they stand for, and sums are multiplied
    by `scales`; y [T, B, hidden] gets the h of the last layer. 1: all are of 16 bits, `scales` and y count for nothing.

    c and h_n are [layers, num_slots, hidden], with the state of row b in slots[b]; c is that of the latest timestep.
    Timestep t of x begins at row t * x_rows and load t * x_steps: x is [T * B, input] or [B, T * input].
    `full` and `empty` hand the stages of a and b to the warpgroups and back; `stored` and `counted` do so with what
    they have stored.
    """
    a = gl.allocate_shared_memory(h.dtype, [STAGES * WARPGROUPS, h.block_shape[0], h.block_shape[1]], h.layout)
    b = gl.allocate_shared_memory(
        weights.dtype, [STAGES, weights.block_shape[0], weights.block_shape[1]], weights.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    stored = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    counted = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=WARPGROUPS)
    mbarrier.init(stored, count=WARPGROUPS)
    mbarrier.init(counted, count=1)
    ring, signals, sizes = (a, b, full, empty), (stored, counted), (timesteps, batch, row_blocks)
    states, times, operands = (c, h_out, y, h_n, slots, num_slots), (x_rows, x_steps), (x, h_0, h, weights, x_weights)
    sums = bias, scales
    if WARPGROUPS == 1:
        gl.warp_specialize(
            [
                (_multiply, (0, operands, sums, states, ring, signals, sizes, LAYERS, HIDDEN, INPUT_STEPS, H_SCALE)),
                (_load, (operands, ready, ring, sizes, times, LAYERS, HIDDEN, INPUT_STEPS)),
                (_count, (ready, weights, signals, sizes, LAYERS, HIDDEN)),
            ],
            [1, 1],  # warps; the first has four
            [24, 24],  # registers of a thread; the first has the rest
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (0, operands, sums, states, ring, signals, sizes, LAYERS, HIDDEN, INPUT_STEPS, H_SCALE)),
                (_multiply, (1, operands, sums, states, ring, signals, sizes, LAYERS, HIDDEN, INPUT_STEPS, H_SCALE)),
                (_load, (operands, ready, ring, sizes, times, LAYERS, HIDDEN, INPUT_STEPS)),
                (_count, (ready, weights, signals, sizes, LAYERS, HIDDEN)),
            ],
            [4, 1, 1],
            [232, 24, 24],
        )


@gluon.jit
def _locate(
    tile: gl.tensor, diagonal: gl.tensor, before: gl.tensor, sizes: gl.tuple, LAYERS: gl.constexpr, BLOCKS: gl.constexpr
) -> Any:
    """Cell and block of a tile; `diagonal` and the cells `before` it as they were at a tile before, at first 0, 0.

    The row block counts fastest, so that tiles that run together share weights. BLOCKS: of columns.
    """
    timesteps, _, row_blocks = sizes
    cell = tile // (row_blocks * BLOCKS)
    lowest = gl.maximum(diagonal - timesteps + 1, 0)  # layer
    cells = gl.minimum(diagonal, LAYERS - 1) - lowest + 1
    while cell >= before + cells:
        before += cells
        diagonal += 1
        lowest = gl.maximum(diagonal - timesteps + 1, 0)
        cells = gl.minimum(diagonal, LAYERS - 1) - lowest + 1
    layer = lowest + cell - before
    block = tile % (row_blocks * BLOCKS)
    return diagonal, before, layer, diagonal - layer, block % row_blocks, block // row_blocks


@gluon.jit
def _load(
    operands: gl.tuple,
    ready: gl.tensor,
    ring: gl.tuple,
    sizes: gl.tuple,
    times: gl.tuple,
    LAYERS: gl.constexpr,
    HIDDEN: gl.constexpr,
    INPUT_STEPS: gl.constexpr,
) -> None:
    """Bring the operands of this block's tiles, as fast as stages become empty.

    The last block of rows reads into the next cell, or zeros behind the end: what comes of that is stored nowhere.
    """
    x, h_0, h, weights, x_weights = operands
    timesteps, batch, row_blocks = sizes
    x_rows, x_steps = times
    COLUMNS: gl.constexpr = weights.block_shape[0]
    BLOCKS: gl.constexpr = 4 * HIDDEN // COLUMNS
    WARPGROUPS: gl.constexpr = ring[0].shape[0] // ring[1].shape[0]
    STEPS: gl.constexpr = HIDDEN // h.block_shape[1]
    loads, diagonal, before = 0, 0, 0
    for tile in range(gl.program_id(0), LAYERS * timesteps * row_blocks * BLOCKS, gl.num_programs(0)):
        diagonal, before, layer, t, row_block, column_block = _locate(tile, diagonal, before, sizes, LAYERS, BLOCKS)
        row = row_block * (WARPGROUPS * h.block_shape[0])
        w_row = (layer * BLOCKS + column_block) * COLUMNS
        # what is ready first goes first: x, h of the state, and of others that with which the diagonal before began
        if layer == 0:
            x_row, x_step = t * x_rows + row, t * x_steps
            loads = _load_steps(loads, x, x_row, x_step, INPUT_STEPS, x_weights, w_row, 0, ready, 0, ring)
        if t == 0:
            loads = _load_steps(loads, h_0, layer * batch + row, 0, STEPS, weights, w_row, STEPS, ready, 0, ring)
        if layer > 0:
            cell = (layer - 1) * timesteps + t
            counter = ready + cell * row_blocks + row_block
            loads = _load_steps(loads, h, cell * batch + row, 0, STEPS, weights, w_row, 0, counter, BLOCKS, ring)
        if t > 0:
            cell = layer * timesteps + t - 1
            counter = ready + cell * row_blocks + row_block
            loads = _load_steps(loads, h, cell * batch + row, 0, STEPS, weights, w_row, STEPS, counter, BLOCKS, ring)


@gluon.jit
def _load_steps(
    loads: gl.tensor,
    matrix: tma.tensor_descriptor,
    row: gl.tensor,
    first: gl.tensor,
    STEPS: gl.constexpr,
    weights: tma.tensor_descriptor,
    w_row: gl.tensor,
    W_STEP: gl.constexpr,
    counter: gl.tensor,
    TARGET: gl.constexpr,
    ring: gl.tuple,
) -> gl.tensor:
    """Bring STEPS steps of weights, and of rows from step `first` on, once `counter` has come to TARGET.

    Returns the number of loads so far.
    """
    STAGES: gl.constexpr = ring[1].shape[0]
    AHEAD: gl.constexpr = min(STAGES - 1, STEPS)
    if TARGET > 0:
        ahead = 0
        if _acquire(counter) < TARGET:
            # Wait with weights in all stages but one: that of the load before becomes empty only when the next product
            # runs, and that needs the rows.
            ahead = AHEAD
            for step in range(AHEAD):
                _load_weights(loads + step, weights, w_row, W_STEP + step, ring)
            while _acquire(counter) < TARGET:
                pass
        # they stored by ordinary stores, these are loads of another kind
        gl.inline_asm_elementwise(
            "fence.proxy.async.global; mov.b32 $0, $1;", "=r,r", [ahead], dtype=gl.int32, is_pure=False, pack=1
        )
        for step in range(ahead):
            _load_rows(loads + step, matrix, row, first + step, ring)
        for step in range(ahead, STEPS):
            _load_weights(loads + step, weights, w_row, W_STEP + step, ring)
            _load_rows(loads + step, matrix, row, first + step, ring)
    else:
        for step in range(STEPS):
            _load_weights(loads + step, weights, w_row, W_STEP + step, ring)
            _load_rows(loads + step, matrix, row, first + step, ring)
    return loads + STEPS


@gluon.jit
def _load_weights(
    load: gl.tensor,
    weights: tma.tensor_descriptor,
    row: gl.tensor,
    step: gl.tensor,
    ring: gl.tuple,
) -> None:
    """The first half of a load, when its stage is empty: full means that the rows have arrived too."""
    a, b, full, empty = ring
    STAGES: gl.constexpr = b.shape[0]
    stage = load % STAGES
    mbarrier.wait(empty.index(stage), (load // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), (a.numel + b.numel) // STAGES * b.dtype.primitive_bitwidth // 8)  # bytes
    at = [row, step * weights.block_shape[1]]
    tma.async_copy_global_to_shared(weights, at, full.index(stage), _as(b.index(stage), weights))


@gluon.jit
def _load_rows(
    load: gl.tensor,
    matrix: tma.tensor_descriptor,
    row: gl.tensor,
    step: gl.tensor,
    ring: gl.tuple,
) -> None:
    """The other half of a load."""
    a, _, full, _ = ring
    STAGES: gl.constexpr = full.shape[0]
    WARPGROUPS: gl.constexpr = a.shape[0] // STAGES
    stage = load % STAGES
    for i in gl.static_range(WARPGROUPS):
        at = [row + i * matrix.block_shape[0], step * matrix.block_shape[1]]
        to = _as(a.index(stage * WARPGROUPS + i), matrix)
        tma.async_copy_global_to_shared(matrix, at, full.index(stage), to)


@gluon.jit
def _as(memory: gl.tensor, matrix: tma.tensor_descriptor) -> gl.tensor:
    """Shared memory as what one load of the matrix brings: x and its weights have 16 bits where others have 8."""
    if memory.dtype == matrix.dtype:
        return memory
    else:
        return memory._reinterpret(matrix.dtype, matrix.block_shape, matrix.layout)


@gluon.jit
def _acquire(counter: gl.tensor) -> gl.tensor:
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [counter], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _multiply(
    WHICH: gl.constexpr,
    operands: gl.tuple,
    sums: gl.tuple,
    states: gl.tuple,
    ring: gl.tuple,
    signals: gl.tuple,
    sizes: gl.tuple,
    LAYERS: gl.constexpr,
    HIDDEN: gl.constexpr,
    INPUT_STEPS: gl.constexpr,
    H_SCALE: gl.constexpr,
) -> None:
    """Rows WHICH * 64 and the next 63 of this block's tiles: the product, then c and h of it."""
    x, _, _, _, x_weights = operands
    c_in_slots, h, y, h_n, slots, num_slots = states
    a, b, full, empty = ring
    stored, counted = signals
    timesteps, batch, row_blocks = sizes
    STAGES: gl.constexpr = b.shape[0]
    WARPGROUPS: gl.constexpr = a.shape[0] // STAGES
    COLUMNS: gl.constexpr = b.shape[1]
    BLOCKS: gl.constexpr = 4 * HIDDEN // COLUMNS
    ROWS: gl.constexpr = a.shape[1]
    STEPS: gl.constexpr = HIDDEN // a.shape[2]
    UNITS: gl.constexpr = COLUMNS // 4
    LAYOUT: gl.constexpr = _units_layout(UNITS)
    ACCUMULATOR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, a.shape[2] // 4])
    X_ACCUMULATOR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, x.block_shape[1] // 4])
    loads, diagonal, before = 0, 0, 0
    for tile in range(gl.program_id(0), LAYERS * timesteps * row_blocks * BLOCKS, gl.num_programs(0)):
        diagonal, before, layer, t, row_block, column_block = _locate(tile, diagonal, before, sizes, LAYERS, BLOCKS)
        rows = (row_block * WARPGROUPS + WHICH) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        units = column_block * UNITS + gl.arange(0, UNITS, gl.SliceLayout(0, LAYOUT))
        at = gl.expand_dims(rows, 1) * HIDDEN + gl.expand_dims(units, 0)  # [rows, units], within a cell
        valid = gl.expand_dims(rows < batch, 1)
        slot = gl.expand_dims(gl.load(slots + rows, rows < batch, other=0), 1)
        in_slots = (layer * num_slots + slot) * HIDDEN + gl.expand_dims(units, 0)  # within c and h_n

        # acc: gates of [input of the layer, h of t - 1], each half of them scaled as tanh needs them
        acc = gl.zeros([ROWS, COLUMNS], gl.float32, ACCUMULATOR)
        steps = gl.where(layer == 0, INPUT_STEPS, STEPS)  # those that come first; as many follow as h has
        if H_SCALE > 1:  # noqa: SIM102  # one is decided when this is compiled
            if layer == 0:  # products of another kind
                x_acc = gl.zeros([ROWS, COLUMNS], gl.float32, X_ACCUMULATOR)
                x_acc = _multiply_steps(loads, 0, INPUT_STEPS, x_acc, x, x_weights, WHICH, ring)
                x_acc = warpgroup_mma_wait(0, deps=[x_acc])
                loads += INPUT_STEPS
                mbarrier.arrive(empty.index((loads - 1) % STAGES), count=1)
                acc = gl.convert_layout(x_acc, ACCUMULATOR, assert_trivial=True)
                steps = 0
        acc = _multiply_steps(loads, 0, steps, acc, a, b, WHICH, ring)
        loads += steps
        # h of t - 1 has arrived or comes next, so c of t - 1 was stored, if it is not that of the state
        mbarrier.wait(full.index(loads % STAGES), loads // STAGES & 1)
        c = gl.load(c_in_slots + in_slots, valid, other=0.0, cache_modifier=".cg")
        acc = _multiply_steps(loads, steps, STEPS, acc, a, b, WHICH, ring)
        loads += STEPS
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((loads - 1) % STAGES), count=1)

        gates = gl.reshape(acc, [ROWS, COLUMNS // 128, 8, 2, 4, 2])  # units // 32, unit % 8, gate // 2, lane, gate % 2
        gates = gl.reshape(gl.permute(gates, [0, 1, 4, 2, 3, 5]), [ROWS, UNITS, 2, 2])
        i_and_g, f_and_o = gl.split(gates)
        i, g = gl.split(i_and_g)
        f, o = gl.split(f_and_o)
        first = layer * 4 * HIDDEN + units
        i = _tanh(_gate(i, sums, first, LAYOUT, H_SCALE)) * 0.5 + 0.5
        f = _tanh(_gate(f, sums, first + HIDDEN, LAYOUT, H_SCALE)) * 0.5 + 0.5
        g = _tanh(_gate(g, sums, first + 2 * HIDDEN, LAYOUT, H_SCALE))
        o = _tanh(_gate(o, sums, first + 3 * HIDDEN, LAYOUT, H_SCALE)) * 0.5 + 0.5
        new_c = f * c.to(gl.float32) + i * g
        new_h = (o * _tanh(new_c)).to(h_n.dtype.element_ty)

        gl.store(c_in_slots + in_slots, new_c.to(c_in_slots.dtype.element_ty), valid)
        at_h = h + ((layer * timesteps + t) * batch).to(gl.int64) * HIDDEN + at
        if H_SCALE > 1:
            gl.store(at_h, (new_h.to(gl.float32) * H_SCALE).to(h.dtype.element_ty), valid)
            if layer == LAYERS - 1:
                gl.store(y + (t * batch).to(gl.int64) * HIDDEN + at, new_h, valid)
        else:
            gl.store(at_h, new_h, valid)
        if t == timesteps - 1:
            gl.store(h_n + in_slots, new_h, valid)
        mbarrier.wait(counted, (tile // gl.num_programs(0) & 1) ^ 1)  # the tile before
        mbarrier.arrive(stored, count=1)


@gluon.jit
def _multiply_steps(
    loads: gl.tensor,
    done: gl.tensor,
    steps: gl.tensor,
    acc: gl.tensor,
    rows: gl.tensor,
    weights: gl.tensor,
    WHICH: gl.constexpr,
    ring: gl.tuple,
) -> gl.tensor:
    """acc [rows, columns] += a @ b^T of the next `steps` loads, after the `done` ones of this tile.

    rows, weights: of the dtype that these loads bring. A product runs while the next is issued: the last one still does
    at the end, and its stage is still full.
    """
    a, b, full, empty = ring
    STAGES: gl.constexpr = b.shape[0]
    WARPGROUPS: gl.constexpr = a.shape[0] // STAGES
    for step in range(steps):
        stage = loads % STAGES
        mbarrier.wait(full.index(stage), loads // STAGES & 1)
        operands = _as(a.index(stage * WARPGROUPS + WHICH), rows), _as(b.index(stage), weights).permute((1, 0))
        acc = warpgroup_mma(operands[0], operands[1], acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index((loads + STAGES - 1) % STAGES), count=1, pred=done + step > 0)
        loads += 1
    return acc


@gluon.jit
def _gate(gate: gl.tensor, sums: gl.tuple, units: gl.tensor, LAYOUT: gl.constexpr, H_SCALE: gl.constexpr) -> gl.tensor:
    """Products of a gate [rows, units], scaled as they are to be, and the bias of its units."""
    bias, scales = sums
    gate = gl.convert_layout(gate, LAYOUT, assert_trivial=True)
    if H_SCALE > 1:
        gate = gate * gl.expand_dims(gl.load(scales + units), 0)
    return gate + gl.expand_dims(gl.load(bias + units), 0)


@gluon.jit
def _tanh(values: gl.tensor) -> gl.tensor:
    """To 11 bits, as exact as fp16, in one instruction; an exponential and a division would take several."""
    return gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [values], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _count(
    ready: gl.tensor,
    weights: tma.tensor_descriptor,
    signals: gl.tuple,
    sizes: gl.tuple,
    LAYERS: gl.constexpr,
    HIDDEN: gl.constexpr,
) -> None:
    """Count each tile when all warpgroups have stored theirs: in a warp of its own, for a release takes its time."""
    stored, counted = signals
    timesteps, _, row_blocks = sizes
    BLOCKS: gl.constexpr = 4 * HIDDEN // weights.block_shape[0]
    diagonal, before = 0, 0
    for tile in range(gl.program_id(0), LAYERS * timesteps * row_blocks * BLOCKS, gl.num_programs(0)):
        diagonal, before, layer, t, row_block, _ = _locate(tile, diagonal, before, sizes, LAYERS, BLOCKS)
        mbarrier.wait(stored, tile // gl.num_programs(0) & 1)
        gl.atomic_add(ready + (layer * timesteps + t) * row_blocks + row_block, 1, sem="release", scope="gpu")
        mbarrier.arrive(counted, count=1)


@triton.jit(do_not_specialize=["num_ready", "num_slots"])
def _begin(
    h: tl.tensor,
    slots: tl.tensor,
    h_0: tl.tensor,
    ready: tl.tensor,
    num_ready: tl.tensor,
    num_slots: tl.tensor,
    hidden: tl.tensor,
    HIDDEN: tl.constexpr,
    SCALE: tl.constexpr,
) -> None:
    """h_0 [layers, B, hidden], SCALE times what is in the slots of h [layers, num_slots, hidden]; `ready` is 0."""
    row, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    unit = tl.arange(0, HIDDEN)
    begin = (layer * num_slots + tl.load(slots + row)) * hidden
    value = tl.load(h + begin + unit, unit < hidden)
    if SCALE > 1:
        value = (value.to(tl.float32) * SCALE).to(h_0.dtype.element_ty)
    tl.store(h_0 + (layer * tl.num_programs(0) + row) * hidden + unit, value, unit < hidden)
    for i in range(layer * tl.num_programs(0) + row, num_ready, tl.num_programs(0) * tl.num_programs(1)):
        tl.store(ready + i, 0)


@triton.jit
def _top_k(
    y: tl.tensor,
    values: tl.tensor,
    indices: tl.tensor,
    values_t: tl.tensor,
    values_b: tl.tensor,
    indices_t: tl.tensor,
    indices_b: tl.tensor,
    outputs: tl.tensor,
    k: tl.tensor,
    OUTPUTS: tl.constexpr,
) -> None:
    """One row: takes k times the largest of numbers whose upper half orders the values; the lower is -index."""
    b, t = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    index = tl.arange(0, OUTPUTS)
    value = tl.load(y + (t * tl.num_programs(0) + b) * outputs + index, index < outputs, other=0.0)
    bits = value.to(tl.int16, bitcast=True).to(tl.int32)
    order = tl.where(value != value, 32767, tl.where(bits < 0, bits ^ 0x7FFF, bits))  # NaN is the largest
    left = tl.where(index < outputs, order * 65536 + (65535 - index), -(2**31))
    for place in range(k):
        best = tl.max(left, 0)
        left = tl.where(left == best, -(2**31), left)
        best_order = best >> 16
        best_bits = tl.where(best_order < 0, best_order ^ 0x7FFF, best_order).to(tl.int16)
        best_value = best_bits.to(y.dtype.element_ty, bitcast=True)
        tl.store(values + t * values_t + b * values_b + place, best_value.to(values.dtype.element_ty))
        tl.store(indices + t * indices_t + b * indices_b + place, 65535 - (best & 0xFFFF))
