"""The selective scan and the convolution before it in Triton: for CUDA, without nvcc, and with the same bits again.

A C compiler and Python's headers are wanted once on each machine (helix.models.scan_triton_driver).
The equations and the meaning of the arguments stand in helix.models.scan. The tokens are cut into segments, in the
order of the scan, so that there are about PROGRAMS programs of one warp whatever the batch is:

    forward     _walk: each segment from a state of zeros to its last    _join: the state at the start of each segment
                _read: each segment again from there, with its outputs
    backward    _walk: the state at every TILE tokens, and each segment's adjoint from zeros    _join
                _backward: each segment from its last tile to its first, with all gradients

A channel is a lane of a warp and its N states are registers, so a step of the recurrence is an exponential, a product
and two sums. An SM computes 16 exponentials in a cycle, which is what limits _walk and _read: for each a warp issues
eight or nine instructions in all, in the eight cycles that it takes. _backward holds the decays and states of TILE
tokens for one state number at a time, so it computes no exponential twice; its limit is the instructions, as compiled
32 for each state of each token, of which 10 add up over the channels of a warp for the gradients of B and C. An
associative scan over the tokens would add a second product to each step and shuffles between lanes, and gain nothing
while there are enough warps. Nothing is divided by a decay: where a segment's share of a state is wanted, it is the
exponential of A times the sum of its steps.

The order of every sum in a kernel follows from the shapes alone: there are no atomics and nothing is tuned at run time.
Sums over tokens are float32 within a segment and float64, torch's, over the segments. States and sums are float32,
whatever the activations are.

Kept for the backward are the inputs and the states at the start of each segment. The backward holds, while it runs,
N / TILE tensors [B, L, E] of states.

Legend: B batch, L tokens, E channels, N state, K taps of the convolution, S segments.
"""

# The kernels are in Triton's language, which types loops and indices in its own way and knows no starred tuples.
# ruff: noqa: RUF005
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from helix.models.scan_shapes import CONV_SHAPES, SCAN_SHAPES, require_agreement

#: The most programs that the scan is cut into, of one warp each: four for each of the 528 schedulers of an H100 or
#: H200, all of them at once. It is a constant, so that the segments do not depend on which GPU there is.
PROGRAMS = 2112

#: Tokens whose inputs a program holds at a time.
TILE: tl.constexpr = tl.constexpr(8)

#: Channels of a program: a lane has one of them, or in _backward two, so that half of its sums need no shuffles.
LANES, PAIRS = 32, 64

#: States that _backward works on side by side.
ABREAST = 1

#: States that a program of _join follows, and how many segments ahead it reads.
JOINED, AHEAD = 128, 8

#: Registers of a lane of _walk and _read: as many as 16 warps leave each other on an SM.
REGISTERS = 128

#: The convolution: tokens and channels of a tile, and tokens of a program of its backward.
CONV_TILE, CONV_LANES, CONV_SPAN = 8, 128, 64

LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))


def _kernel(function: Callable) -> Any:
    """The kernel, compiled once for all sizes, strides and addresses.

    Where it knew that rows are aligned, it would read several channels into each lane, and lay out all the rest so.
    """
    parameters = inspect.signature(function).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=names)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(x * -LOG2_E))


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), and its slope.

    log(1 + w) is 2 artanh(w / (2 + w)), a series without cancellation: tl.log would be as wrong as 1 + w is rounded.
    """
    w = tl.exp2(tl.abs(x) * -LOG2_E)
    s = w / (2 + w)
    q = s * s
    p = 1 / 15 + q * (1 / 17)
    p = 1 / 13 + q * p
    p = 1 / 11 + q * p
    p = 1 / 9 + q * p
    p = 1 / 7 + q * p
    p = 1 / 5 + q * p
    p = 1 / 3 + q * p
    return tl.maximum(x, 0.0) + 2 * (s + s * q * p), tl.where(x < 0, w, 1.0) / (1 + w)


@triton.jit
def _token(i, tokens, REVERSE: tl.constexpr):
    """Where in memory the i-th token of the scan lies."""
    return tokens - 1 - i if REVERSE else i


@triton.jit
def _step(dt, at, live, bias):
    """d of some channels at a token, 0 for those that are not."""
    d, _ = _softplus(tl.load(dt + at, live, 0.0).to(tl.float32) + bias)
    return tl.where(live, d, 0.0)


@_kernel
def _walk(
    x_ptr,
    z_ptr,
    dt_ptr,
    BC_ptr,
    A_ptr,
    bias_ptr,
    starts_ptr,
    out_ptr,
    sums_ptr,
    x_batch,
    x_token,
    z_batch,
    z_token,
    dt_batch,
    dt_token,
    tokens,
    channels,
    tiles,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    REVERSE: tl.constexpr,
    ADJOINT: tl.constexpr,
    KEEP: tl.constexpr,
    STARTED: tl.constexpr,
):
    """The recurrence over a segment of `tiles` tiles, without outputs.

    With KEEP from the state at its start, of which the one before every tile goes to `out` [B, S tiles, N, E]; else
    from zeros, with the last to `out` [B, S, N, E] and the sum of the steps to `sums` [B, S, E]. ADJOINT: the adjoint,
    from the last token to the first, with the gradient of the output in place of u, and C in place of B.
    """
    batch, s, segments = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    e, n = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH), tl.arange(0, ROWS)
    mine = e < channels
    x_ptr += batch * x_batch + e
    z_ptr += batch * z_batch + e
    dt_ptr += batch * dt_batch + e
    BC_ptr += batch * tokens * 2 * N + (N if ADJOINT else 0) + n
    place, there = n[:, None] * channels + e[None, :], (n[:, None] < N) & mine[None, :]
    A = tl.load(A_ptr + place, there, 0.0)
    bias = tl.load(bias_ptr + e, mine, 0.0)
    at = (batch * segments + s) * N * channels + place
    h = tl.full([ROWS, WIDTH], 0.0, tl.float32)
    if STARTED:
        h += tl.load(starts_ptr + at, there, 0.0)
    total = tl.full([WIDTH], 0.0, tl.float32)
    for number in range(tiles):
        tile = s * tiles + (tiles - 1 - number if ADJOINT else number)
        if KEEP:
            tl.store(out_ptr + (batch * segments * tiles + tile) * N * channels + place, h, there)
        d, x = (), ()
        for j in tl.static_range(TILE):
            i = tile * TILE + (TILE - 1 - j if ADJOINT else j)
            t, live = _token(i, tokens, REVERSE), mine & (i < tokens)
            d_j = _step(dt_ptr, t * dt_token, live, bias)
            x_j = tl.load(x_ptr + t * x_token, live, 0.0).to(tl.float32)
            if ADJOINT:
                z_j = tl.load(z_ptr + t * z_token, live, 0.0).to(tl.float32)
                x_j = x_j * z_j * _sigmoid(z_j)
            else:
                x_j = x_j * d_j
            d, x = d + (d_j,), x + (x_j,)
            total += d_j
        for j in tl.static_range(TILE):
            i = tile * TILE + (TILE - 1 - j if ADJOINT else j)
            t, seen = _token(i, tokens, REVERSE), (n < N) & (i < tokens)
            B = tl.load(BC_ptr + t * 2 * N, seen, 0.0).to(tl.float32)
            decay = tl.exp2(d[j][None, :] * A)
            added = x[j][None, :] * B[:, None]
            h = decay * (h + added) if ADJOINT else decay * h + added
    if not KEEP:
        tl.store(out_ptr + at, h, there)
        tl.store(sums_ptr + (batch * segments + s) * channels + e, total, mine)


@_kernel
def _join(
    ends_ptr,
    sums_ptr,
    A_ptr,
    starts_ptr,
    segments,
    channels,
    numbers,
    WIDTH: tl.constexpr,
    AHEAD: tl.constexpr,
    ADJOINT: tl.constexpr,
):
    """What every segment starts from, [B, S, N, E], from what each would end with had it started from zeros."""
    batch = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    there = place < numbers
    A = tl.load(A_ptr + place, there, 0.0)
    h = tl.full([WIDTH], 0.0, tl.float32)
    for first in range(0, segments, AHEAD):
        decay, ends = (), ()
        for k in tl.static_range(AHEAD):  # none of these reads waits for the one before
            s = segments - 1 - first - k if ADJOINT else first + k
            live = there & (first + k < segments)
            at = batch * segments + s
            decay += (tl.exp2(A * tl.load(sums_ptr + at * channels + place % channels, live, 0.0)),)
            ends += (tl.load(ends_ptr + at * numbers + place, live, 0.0),)
        for k in tl.static_range(AHEAD):
            s = segments - 1 - first - k if ADJOINT else first + k
            tl.store(starts_ptr + (batch * segments + s) * numbers + place, h, there & (first + k < segments))
            h = decay[k] * h + ends[k]


@_kernel
def _read(
    u_ptr,
    z_ptr,
    dt_ptr,
    BC_ptr,
    A_ptr,
    D_ptr,
    bias_ptr,
    starts_ptr,
    y_ptr,
    u_batch,
    u_token,
    z_batch,
    z_token,
    dt_batch,
    dt_token,
    tokens,
    channels,
    tiles,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The outputs [B, L, E] of a segment of `tiles` tiles, from the state at its start."""
    batch, s, segments = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    e, n = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH), tl.arange(0, ROWS)
    mine = e < channels
    u_ptr += batch * u_batch + e
    z_ptr += batch * z_batch + e
    dt_ptr += batch * dt_batch + e
    BC_ptr += batch * tokens * 2 * N + n
    y_ptr += batch * tokens * channels + e
    place, there = n[:, None] * channels + e[None, :], (n[:, None] < N) & mine[None, :]
    A = tl.load(A_ptr + place, there, 0.0)
    bias = tl.load(bias_ptr + e, mine, 0.0)
    D = tl.load(D_ptr + e, mine, 0.0)
    h = tl.load(starts_ptr + (batch * segments + s) * N * channels + place, there, 0.0)
    for number in range(tiles):
        first = (s * tiles + number) * TILE
        d, u, z = (), (), ()
        for j in tl.static_range(TILE):
            t, live = _token(first + j, tokens, REVERSE), mine & (first + j < tokens)
            d += (_step(dt_ptr, t * dt_token, live, bias),)
            u += (tl.load(u_ptr + t * u_token, live, 0.0).to(tl.float32),)
            z += (tl.load(z_ptr + t * z_token, live, 0.0).to(tl.float32),)
        y = ()
        for j in tl.static_range(TILE):
            t, seen = _token(first + j, tokens, REVERSE), (n < N) & (first + j < tokens)
            B = tl.load(BC_ptr + t * 2 * N, seen, 0.0).to(tl.float32)
            C = tl.load(BC_ptr + t * 2 * N + N, seen, 0.0).to(tl.float32)
            h = tl.exp2(d[j][None, :] * A) * h + (d[j] * u[j])[None, :] * B[:, None]
            y += (tl.sum(h * C[:, None], 0) + D * u[j],)
        for j in tl.static_range(TILE):
            t, live = _token(first + j, tokens, REVERSE), mine & (first + j < tokens)
            tl.store(y_ptr + t * channels, y[j] * z[j] * _sigmoid(z[j]), live)


@_kernel
def _backward(
    dout_ptr,
    u_ptr,
    z_ptr,
    dt_ptr,
    BC_ptr,
    A_ptr,
    D_ptr,
    bias_ptr,
    states_ptr,
    carries_ptr,
    du_ptr,
    dz_ptr,
    ddt_ptr,
    dBC_ptr,
    dparameters_ptr,
    dout_batch,
    dout_token,
    u_batch,
    u_token,
    z_batch,
    z_token,
    dt_batch,
    dt_token,
    tokens,
    channels,
    tiles,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """All gradients of a segment of `tiles` tiles, from the last to the first.

    `states` [B, S tiles, N, E]: those before every tile. `carries` [B, S, N, E]: the adjoint that comes from the
    segment after this one, the first adjoint there times the first decay there; overwritten. `dBC` [blocks, B, L, 2 N]:
    the sums over the channels of a program, for B and for C. `dparameters` [B, S, N + 2, E]: those over the tokens of a
    segment, for A, D and the bias.
    """
    batch, s, segments = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    block, batches = tl.program_id(0).to(tl.int64), tl.num_programs(2)
    e, rows = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH), tl.arange(0, ROWS)
    mine = e < channels
    # From its first token on, the scan goes this way.
    way = -1 if REVERSE else 1
    begin = tokens - 1 if REVERSE else 0
    dout_ptr += batch * dout_batch + begin * dout_token + e
    u_ptr += batch * u_batch + begin * u_token + e
    z_ptr += batch * z_batch + begin * z_token + e
    dt_ptr += batch * dt_batch + begin * dt_token + e
    BC_ptr += (batch * tokens + begin) * 2 * N + rows
    du_ptr += (batch * tokens + begin) * channels + e
    dz_ptr += (batch * tokens + begin) * channels + e
    ddt_ptr += (batch * tokens + begin) * channels + e
    dBC_ptr += ((block * batches + batch) * tokens + begin) * 2 * N + rows
    carries_ptr += (batch * segments + s) * N * channels
    dparameters_ptr += (batch * segments + s) * (N + 2) * channels
    bias = tl.load(bias_ptr + e, mine, 0.0)
    D = tl.load(D_ptr + e, mine, 0.0)
    dD, dbias = tl.full([WIDTH], 0.0, tl.float32), tl.full([WIDTH], 0.0, tl.float32)
    for number in range(tiles):
        tile = s * tiles + tiles - 1 - number
        first = tile * TILE
        d, x, dy, y, dx, dd = (), (), (), (), (), ()
        for j in tl.static_range(TILE):
            t, live = way * (first + j), mine & (first + j < tokens)
            d_j = _step(dt_ptr, t * dt_token, live, bias)
            u_j = tl.load(u_ptr + t * u_token, live, 0.0).to(tl.float32)
            z_j = tl.load(z_ptr + t * z_token, live, 0.0).to(tl.float32)
            dout_j = tl.load(dout_ptr + t * dout_token, live, 0.0).to(tl.float32)
            d, x, dy = d + (d_j,), x + (d_j * u_j,), dy + (dout_j * z_j * _sigmoid(z_j),)
            nothing = tl.full([WIDTH], 0.0, tl.float32)
            y, dx, dd = y + (nothing,), dx + (nothing,), dd + (nothing,)
        before_tile = states_ptr + (batch * segments * tiles + tile) * N * channels
        place, there = rows[:, None] * channels + e[None, :], (rows[:, None] < N) & mine[None, :]
        next_A = tl.load(A_ptr + place, there, 0.0)
        next_h = tl.load(before_tile + place, there, 0.0)
        next_carry = tl.load(carries_ptr + place, there, 0.0)
        for n0 in range(0, N, ROWS):
            n, A, h, carry = n0 + rows, next_A, next_h, next_carry
            place, there = n[:, None] * channels + e[None, :], (n[:, None] < N) & mine[None, :]
            # What the next states need comes from afar, so it is asked for before it is wanted.
            soon, wanted = place + ROWS * channels, (n[:, None] + ROWS < N) & mine[None, :]
            next_A = tl.load(A_ptr + soon, wanted, 0.0)
            next_h = tl.load(before_tile + soon, wanted, 0.0)
            next_carry = tl.load(carries_ptr + soon, wanted, 0.0)
            # All reads come before and all writes after what is computed, or each would wait for the one before it.
            B, C = (), ()
            here = way * first * 2 * N + n0
            for j in tl.static_range(TILE):
                at, seen = BC_ptr + here + way * j * 2 * N, (n < N) & (first + j < tokens)
                B += (tl.load(at, seen, 0.0).to(tl.float32),)
                C += (tl.load(at + N, seen, 0.0).to(tl.float32),)
            decays, kept, dC, y_so_far = (), (), (), ()
            for j in tl.static_range(TILE):
                decay = tl.exp2(d[j][None, :] * A)
                left = decay * h
                h = left + x[j][None, :] * B[j][:, None]
                decays, kept, dC = decays + (decay,), kept + (left,), dC + (h * dy[j][None, :],)
                y_so_far += (y[j] + tl.sum(h * C[j][:, None], 0),)
            y = y_so_far
            dA = tl.full([ROWS, WIDTH], 0.0, tl.float32)
            dB, dx_so_far, dd_so_far = (), (), ()
            for j in tl.static_range(TILE - 1, -1, -1):
                g = carry + dy[j][None, :] * C[j][:, None]
                w = g * kept[j]  # the gradient of the exponent d A
                dA += d[j][None, :] * w
                dB = (g * x[j][None, :],) + dB
                dx_so_far = (dx[j] + tl.sum(g * B[j][:, None], 0),) + dx_so_far
                dd_so_far = (dd[j] + tl.sum(w * A, 0),) + dd_so_far
                carry = decays[j] * g
            dx, dd = dx_so_far, dd_so_far
            sums = ()
            for j in tl.static_range(TILE):
                sums += ((tl.sum(dB[j], 1), tl.sum(dC[j], 1)),)
            for j in tl.static_range(TILE):
                at, seen = dBC_ptr + here + way * j * 2 * N, (n < N) & (first + j < tokens)
                tl.store(at, sums[j][0], seen)
                tl.store(at + N, sums[j][1], seen)
            tl.store(carries_ptr + place, carry, there)
            before = tl.load(dparameters_ptr + place, there & (number > 0), 0.0)
            tl.store(dparameters_ptr + place, before + dA, there)
        for j in tl.static_range(TILE):
            t, live = way * (first + j), mine & (first + j < tokens)
            # Read again: to keep them would take as many registers as the states do.
            u_j = tl.load(u_ptr + t * u_token, live, 0.0).to(tl.float32)
            z_j = tl.load(z_ptr + t * z_token, live, 0.0).to(tl.float32)
            dout_j = tl.load(dout_ptr + t * dout_token, live, 0.0).to(tl.float32)
            _, slope = _softplus(tl.load(dt_ptr + t * dt_token, live, 0.0).to(tl.float32) + bias)
            sigmoid = _sigmoid(z_j)
            silu_slope = sigmoid * (1 + z_j * (1 - sigmoid))
            # A holds the factor that makes exp of exp2.
            ddt = tl.where(live, (dd[j] * (1 / LOG2_E) + dx[j] * u_j) * slope, 0.0)
            tl.store(dz_ptr + t * channels, dout_j * (y[j] + D * u_j) * silu_slope, live)
            tl.store(du_ptr + t * channels, dx[j] * d[j] + dy[j] * D, live)
            tl.store(ddt_ptr + t * channels, ddt, live)
            dD += dy[j] * u_j
            dbias += ddt
    tl.store(dparameters_ptr + N * channels + e, dD, mine)
    tl.store(dparameters_ptr + (N + 1) * channels + e, dbias, mine)


@triton.jit
def _conv_at(u_ptr, weight_ptr, bias, i, e, mine, u_token, tokens, TAPS: tl.constexpr, REVERSE: tl.constexpr):
    """The convolution at the places i of the scan, [tokens, channels]."""
    pre = tl.full([i.shape[0], e.shape[0]], 0.0, tl.float32) + bias[None, :]
    for tap in tl.static_range(TAPS):
        past = i - (TAPS - 1 - tap)
        seen = ((past >= 0) & (past < tokens))[:, None] & mine[None, :]
        u = tl.load(u_ptr + _token(past, tokens, REVERSE)[:, None] * u_token + e[None, :], seen, 0.0)
        pre += u.to(tl.float32) * tl.load(weight_ptr + e * TAPS + tap, mine, 0.0)[None, :]
    return pre


@_kernel
def _conv_forward(
    u_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    u_batch,
    u_token,
    tokens,
    channels,
    TAPS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """y [B, L, E] for a tile of tokens and channels."""
    batch = tl.program_id(2).to(tl.int64)
    e, i = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH), tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    mine = e < channels
    bias = tl.load(bias_ptr + e, mine, 0.0)
    pre = _conv_at(u_ptr + batch * u_batch, weight_ptr, bias, i, e, mine, u_token, tokens, TAPS, REVERSE)
    at = _token(i, tokens, REVERSE)[:, None] * channels + e[None, :]
    tl.store(y_ptr + batch * tokens * channels + at, pre * _sigmoid(pre), (i < tokens)[:, None] & mine[None, :])


@_kernel
def _conv_backward(
    dy_ptr,
    u_ptr,
    weight_ptr,
    bias_ptr,
    du_ptr,
    dparameters_ptr,
    dy_batch,
    dy_token,
    u_batch,
    u_token,
    tokens,
    channels,
    TAPS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """du [B, L, E] for SPAN tokens, and their sums [B, spans, K + 1, E] for the weights and the bias."""
    batch, span, spans = tl.program_id(2).to(tl.int64), tl.program_id(0), tl.num_programs(0)
    e = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mine = e < channels
    bias = tl.load(bias_ptr + e, mine, 0.0)
    u_ptr += batch * u_batch
    dy_ptr += batch * dy_batch
    dparameters_ptr += (batch * spans + span) * (TAPS + 1) * channels + e
    nothing = tl.full([WIDTH], 0.0, tl.float32)
    dweight, dbias = (), nothing
    for _ in tl.static_range(TAPS):
        dweight += (nothing,)
    for first in range(span * SPAN, span * SPAN + SPAN, HEIGHT):
        i = first + tl.arange(0, HEIGHT)
        here = (i < tokens)[:, None] & mine[None, :]
        u = tl.load(u_ptr + _token(i, tokens, REVERSE)[:, None] * u_token + e[None, :], here, 0.0).to(tl.float32)
        du = tl.full([HEIGHT, WIDTH], 0.0, tl.float32)
        so_far = ()
        for after in tl.static_range(TAPS):
            # A token adds to the one that comes so many after it, by the weight that stands as far before the last.
            later = i + after
            seen = (later < tokens)[:, None] & mine[None, :]
            pre = _conv_at(u_ptr, weight_ptr, bias, later, e, mine, u_token, tokens, TAPS, REVERSE)
            dy = tl.load(dy_ptr + _token(later, tokens, REVERSE)[:, None] * dy_token + e[None, :], seen, 0.0)
            sigmoid = _sigmoid(pre)
            dpre = dy.to(tl.float32) * sigmoid * (1 + pre * (1 - sigmoid))
            du += dpre * tl.load(weight_ptr + e * TAPS + (TAPS - 1 - after), mine, 0.0)[None, :]
            so_far += (dweight[after] + tl.sum(dpre * u, 0),)
            if after == 0:
                dbias += tl.sum(dpre, 0)
        dweight = so_far
        at = _token(i, tokens, REVERSE)[:, None] * channels + e[None, :]
        tl.store(du_ptr + batch * tokens * channels + at, du, here)
    for after in tl.static_range(TAPS):
        tl.store(dparameters_ptr + (TAPS - 1 - after) * channels, dweight[after], mine)
    tl.store(dparameters_ptr + TAPS * channels, dbias, mine)


# --- The operators: opaque to torch.compile, and without a synchronisation or a size that data decides, so that CUDA
# graphs can hold them. They are registered without their gradients, as those of helix.models.scan_numba are. Triton
# launches on the current device, which need not be the tensors'.

#: The library of the operators. An operator that is registered a second time is freed under those who hold the first,
#: so that a copy for Triton's interpreter, beside the compiled kernels of one process, has operators of its own.
LIBRARY = "helix_interpreted" if triton.knobs.runtime.interpret else "helix"


def _pieces(length: int, size: int) -> int:
    return -(-length // size)


def segments_of(batch: int, tokens: int, channels: int) -> tuple[int, int]:
    """The number of segments, and the tiles of each, for at most PROGRAMS programs: by the shapes alone."""
    whole = _pieces(tokens, TILE.value)
    tiles = _pieces(whole, max(1, min(PROGRAMS // max(1, batch * _pieces(channels, LANES)), whole)))
    return _pieces(whole, tiles), tiles


def _rows(x_BLX: Tensor) -> Tensor:
    """The tensor, or a copy where its last dimension does not lie side by side."""
    return x_BLX if x_BLX.stride(-1) == 1 or x_BLX.shape[-1] == 1 else x_BLX.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


class _Pass:
    """What the kernels of one pass over the tokens share."""

    def __init__(self, tensors: Sequence[Tensor], *, reverse: bool):
        u, dt, A, B, C, D, z, dt_bias = tensors
        (self.batch, self.tokens, self.channels), self.state, self.reverse = u.shape, A.shape[1], reverse
        self.u, self.dt, self.z, self.D, self.dt_bias = (
            *(_rows(x) for x in (u, dt, z)),
            D.contiguous(),
            dt_bias.contiguous(),
        )
        self.segments, self.tiles = segments_of(*u.shape)
        # Exponentials are powers of two on a GPU. Both are laid out as the lanes read them.
        self.A_NE = torch.mul(A.t(), LOG2_E.value, out=A.new_empty(A.shape[::-1]))
        self.BC = torch.cat([B, C], dim=-1)
        self.rows = triton.next_power_of_2(self.state)
        self.one_warp = {"num_warps": max(1, self.rows // 32), "maxnreg": REGISTERS}

    def grid(self, width: int) -> tuple[int, int, int]:
        return _pieces(self.channels, width), self.segments, self.batch

    def walk(self, x: Tensor, starts: Tensor | None, *, adjoint: bool, keep: bool) -> tuple[Tensor, Tensor]:
        """What `_walk` writes: states and sums."""
        count = self.segments * self.tiles if keep else self.segments
        out = self.A_NE.new_empty(self.batch, count, self.state, self.channels)
        sums = self.A_NE.new_empty(self.batch, self.segments, self.channels)
        _walk[self.grid(LANES)](
            *(x, self.z, self.dt, self.BC, self.A_NE, self.dt_bias, out if starts is None else starts, out, sums),
            *_strides(x, self.z, self.dt),
            *(self.tokens, self.channels, self.tiles),
            *(self.state, self.rows, LANES, self.reverse, adjoint, keep, starts is not None),
            **self.one_warp,
        )
        return out, sums

    def join(self, x: Tensor, *, adjoint: bool) -> Tensor:
        """The state or the adjoint that every segment starts from, [B, S, N, E]."""
        if self.segments == 1:
            return self.A_NE.new_zeros(self.batch, 1, self.state, self.channels)
        ends, sums = self.walk(x, None, adjoint=adjoint, keep=False)
        starts, numbers = torch.empty_like(ends), self.A_NE.numel()
        _join[(_pieces(numbers, JOINED), self.batch)](
            *(ends, sums, self.A_NE, starts, self.segments, self.channels, numbers, JOINED, AHEAD, adjoint),
            num_warps=1,
        )
        return starts


@torch.library.custom_op(f"{LIBRARY}::selective_scan_triton", mutates_args=())
def selective_scan_forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """y [B, L, E], and the states at the start of every segment, which the backward needs."""
    y = u.new_empty(u.shape)
    ours = _Pass((u, dt, A, B, C, D, z, dt_bias), reverse=reverse)
    with torch.cuda.device_of(u):
        starts = ours.join(ours.u, adjoint=False)
        _read[ours.grid(LANES)](
            *(ours.u, ours.z, ours.dt, ours.BC, ours.A_NE, ours.D, ours.dt_bias, starts, y),
            *_strides(ours.u, ours.z, ours.dt),
            *(ours.tokens, ours.channels, ours.tiles),
            *(ours.state, ours.rows, LANES, reverse),
            **ours.one_warp,
        )
    return y, starts


@selective_scan_forward.register_fake
def _(u, dt, A, B, C, D, z, dt_bias, reverse):  # noqa: ARG001  (the contract's)
    return u.new_empty(u.shape), A.new_empty(len(u), segments_of(*u.shape)[0], *A.shape[::-1])


@torch.library.custom_op(f"{LIBRARY}::selective_scan_triton_backward", mutates_args=())
def selective_scan_backward(
    dy: Tensor,
    starts: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, dt and z, those of B and C [B, L, 2 N], and those of A, D and dt_bias [N + 2, E]."""
    ours, dy = _Pass((u, dt, A, B, C, D, z, dt_bias), reverse=reverse), _rows(dy)
    batch, segments, state, channels = starts.shape
    with torch.cuda.device_of(u):
        states, _ = ours.walk(ours.u, starts, adjoint=False, keep=True)
        carries = ours.join(dy, adjoint=True)
        du, ddt, dz = (x.new_empty(x.shape) for x in (u, dt, z))
        grid = ours.grid(PAIRS)
        dBC = A.new_empty(grid[0], batch, ours.tokens, 2 * state)
        dparameters = A.new_empty(batch, segments, state + 2, channels)
        _backward[grid](
            *(dy, ours.u, ours.z, ours.dt, ours.BC, ours.A_NE, ours.D, ours.dt_bias),
            *(states, carries, du, dz, ddt, dBC, dparameters),
            *_strides(dy, ours.u, ours.z, ours.dt),
            *(ours.tokens, channels, ours.tiles),
            *(state, ABREAST, PAIRS, reverse),
            num_warps=1,
        )
    dBC = (dBC.sum(0) if len(dBC) > 1 else dBC.squeeze(0)).to(ours.BC.dtype)
    return du, ddt, dz, dBC, dparameters.sum((0, 1), dtype=torch.float64).to(A.dtype)


@selective_scan_backward.register_fake
def _(dy, starts, u, dt, A, B, C, D, z, dt_bias, reverse):  # noqa: ARG001  (the contract's)
    (channels, state), dtype = A.shape, torch.promote_types(B.dtype, C.dtype)
    whole = (x.new_empty(x.shape) for x in (u, dt, z))
    return *whole, B.new_empty(*B.shape[:2], 2 * state, dtype=dtype), A.new_empty(state + 2, channels)


def _joined_bytes(u: Tensor, state: int) -> int:
    """A state of every segment, and the sum of its steps."""
    segments, _ = segments_of(*u.shape)
    return 4 * u.shape[0] * segments * (state + 1) * u.shape[2]


def _forward_workspace(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *_: object) -> int:  # noqa: ARG001  (the operator's)
    """B and C side by side, A as the lanes read it, and the last state of every segment."""
    return _BC_bytes(B, C) + 4 * A.numel() + _joined_bytes(u, A.shape[1])


def _backward_workspace(
    dy: Tensor,  # noqa: ARG001  (the operator's)
    starts: Tensor,  # noqa: ARG001
    u: Tensor,
    dt: Tensor,  # noqa: ARG001
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *_: object,
) -> int:
    """The state at every TILE tokens, the adjoint behind every segment, and the parts of the gradients that are sums:
    of B and C by blocks of channels, where one block may be the gradient itself; of the parameters by segments."""
    (batch, tokens, channels), state = u.shape, A.shape[1]
    segments, tiles = segments_of(*u.shape)
    states = 4 * batch * segments * tiles * state * channels
    blocks = _pieces(channels, PAIRS)
    is_result = blocks == 1 and torch.promote_types(B.dtype, C.dtype) == torch.float32
    dBC = 0 if is_result else 4 * blocks * batch * tokens * 2 * state
    dparameters = (4 * batch * segments + 8) * (state + 2) * channels
    return _BC_bytes(B, C) + 4 * A.numel() + states + _joined_bytes(u, state) + dBC + dparameters


def _BC_bytes(B: Tensor, C: Tensor) -> int:  # noqa: N802
    return (B.numel() + C.numel()) * torch.promote_types(B.dtype, C.dtype).itemsize


def _conv_workspace(dy: Tensor, u: Tensor, weight: Tensor, *_: object) -> int:  # noqa: ARG001  (the operator's)
    """The gradients of the parameters by programs."""
    (batch, tokens, channels), taps = u.shape, weight.shape[1]
    return (4 * batch * _pieces(tokens, CONV_SPAN) + 8) * (taps + 1) * channels


#: What an operator holds beside its inputs and results, by its name: for helix.training.memory.
WORKSPACE_BYTES: dict[str, Callable[..., int]] = {
    f"{LIBRARY}::selective_scan_triton": _forward_workspace,
    f"{LIBRARY}::selective_scan_triton_backward": _backward_workspace,
    f"{LIBRARY}::conv_silu_triton_backward": _conv_workspace,
}


@torch.library.custom_op(f"{LIBRARY}::conv_silu_triton", mutates_args=())
def conv_silu_forward(u: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """y [B, L, E] from u [B, L, E] and weight [E, K]."""
    (batch, tokens, channels), y, u = u.shape, u.new_empty(u.shape), _rows(u)
    with torch.cuda.device_of(u):
        _conv_forward[(_pieces(tokens, CONV_TILE), _pieces(channels, CONV_LANES), batch)](
            *(u, weight.contiguous(), bias.contiguous(), y, *_strides(u), tokens, channels),
            *(weight.shape[1], CONV_TILE, CONV_LANES, reverse),
            num_warps=4,
        )
    return y


@conv_silu_forward.register_fake
def _(u, weight, bias, reverse):  # noqa: ARG001  (the contract's)
    return u.new_empty(u.shape)


@torch.library.custom_op(f"{LIBRARY}::conv_silu_triton_backward", mutates_args=())
def conv_silu_backward(dy: Tensor, u: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """The gradients of u, and of weight and bias [K + 1, E]."""
    (batch, tokens, channels), taps, du = u.shape, weight.shape[1], u.new_empty(u.shape)
    u, dy, spans = _rows(u), _rows(dy), _pieces(tokens, CONV_SPAN)
    dparameters = weight.new_empty(batch, spans, taps + 1, channels)
    with torch.cuda.device_of(u):
        _conv_backward[(spans, _pieces(channels, CONV_LANES), batch)](
            *(dy, u, weight.contiguous(), bias.contiguous(), du, dparameters, *_strides(dy, u), tokens, channels),
            *(taps, CONV_TILE, CONV_LANES, CONV_SPAN, reverse),
            num_warps=4,
        )
    return du, dparameters.sum((0, 1), dtype=torch.float64).to(weight.dtype)


@conv_silu_backward.register_fake
def _(dy, u, weight, bias, reverse):  # noqa: ARG001  (the contract's)
    channels, taps = weight.shape
    return u.new_empty(u.shape), weight.new_empty(taps + 1, channels)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, ctx.reverse = inputs
        y, starts = selective_scan_forward(*inputs)
        ctx.save_for_backward(starts, *tensors)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        du, ddt, dz, dBC, sums = selective_scan_backward(dy, *ctx.saved_tensors, ctx.reverse)
        dA, (dD, dbias), (dB, dC) = sums[:-2].t(), sums[-2:], dBC.chunk(2, dim=-1)
        return du, ddt, dA, dB, dC, dD, dz, dbias, None


class _ConvSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, ctx.reverse = inputs
        ctx.save_for_backward(*tensors)
        return conv_silu_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        du, sums = conv_silu_backward(dy, *ctx.saved_tensors, ctx.reverse)
        return du, sums[:-1].t(), sums[-1], None


def selective_scan(
    u_BLE: Tensor,
    dt_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor,
    z_BLE: Tensor,
    dt_bias_E: Tensor,
    reverse: bool,
) -> Tensor:
    """y_BLE in the dtype of `u_BLE`. The parameters are float32, the activations of any dtypes."""
    tensors = (u_BLE, dt_BLE, A_EN, B_BLN, C_BLN, D_E, z_BLE, dt_bias_E)
    _check(tensors, SCAN_SHAPES)
    return _Scan.apply(*tensors, reverse)


def conv_silu(u_BLE: Tensor, weight_EK: Tensor, bias_E: Tensor, reverse: bool) -> Tensor:
    """silu of each channel's convolution over its own past tokens, or with `reverse` over those to come.

    In the dtype of `u_BLE`; the parameters are float32. Of the results in between nothing is kept.
    """
    tensors = (u_BLE, weight_EK, bias_E)
    _check(tensors, CONV_SHAPES)
    return _ConvSilu.apply(*tensors, reverse)


def _check(tensors: Sequence[Tensor], shapes: Sequence[str]) -> None:
    """As `require_agreement`, and ValueError for more numbers than the kernels' 32 bits count."""
    sizes = require_agreement(tensors, shapes, mixed=True)
    for x, letters in zip(tensors, shapes, strict=True):
        if "L" in letters and max(x.stride(1), *x.shape[2:], 2 * sizes.get("N", 0)) * sizes["L"] >= 2**31:
            raise ValueError(f"{sizes['L']} tokens of {list(x.shape)} are more numbers than 32 bits count; cut them")
