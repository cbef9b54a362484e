"""The selective scan and the convolution before it on a CPU, as vector code that numba compiles once and keeps on disk.

The equations and the meaning of the arguments stand in helix.models.scan. What differs is the order of the work: a task
is one batch entry and CHANNELS channels. The states of its channels run along the tokens and are kept at the start of
every chunk only; the backward takes the chunks from the last to the first, recomputes the states of one and runs the
adjoint recurrence over it.

Tasks are fixed by the shapes, sums over tasks are taken in their order, and every product is rounded where it is
written: no bit depends on how many threads there are, or on which vectors the processor has. The threads are plain ones
that call compiled code without the GIL, torch.get_num_threads() of them. Numba's own threading layers would not do:
'omp' aborts a process that was forked after its first use, and 'workqueue' aborts one that enters it twice at a time.

All of it is one file, since numba looks at the age of a kernel's own file only to know whether to compile it anew.

Legend: B batch, L tokens, E channels, N state, K taps of the convolution.
"""

import itertools
import logging
import math
import operator
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from llvmlite import ir
from numba import njit, types
from numba.core import config, event
from numba.core.cgutils import get_or_insert_function
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model
from torch import Tensor

from helix.models.scan_shapes import CONV_SHAPES, SCAN_SHAPES, require_agreement

logger = logging.getLogger(__name__)

#: Channels of a task. What is done to every channel and token for itself is done to all of them at once.
CHANNELS = 128

#: Channels of a task whose states run side by side: as many as a core has registers for, so that none waits for long.
LANES = 32

#: Tokens of a chunk of the convolution's backward, at least as many as taps.
CONV_CHUNK = 16

#: How many tokens before it needs them the convolution asks for them.
AHEAD = 8

#: Bytes of a number, of the LANES and of the CHANNELS numbers of a token, and of what a cache moves at once.
_SIZE, _ROW, _WIDE_ROW, _LINE = 4, 4 * LANES, 4 * CHANNELS, 64

if config.DISABLE_JIT:  # type: ignore[attr-defined]  (numba sets it from the environment)
    raise ImportError("NUMBA_DISABLE_JIT is set, and these kernels are nothing but what they compile to")


# --- Vectors of floats as types that numba knows, and what kernels can do with them.


class _Vector(types.Type):
    def __init__(self, lanes: int) -> None:
        super().__init__(name=f"Vector{lanes}")
        self.lanes = lanes


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any):
        super().__init__(dmm, fe_type, _floats(fe_type.lanes))


_narrow, _wide = _Vector(LANES), _Vector(CHANNELS)
_address, _count, _number = types.int64, types.int64, types.float32


def _floats(lanes: int) -> ir.VectorType:
    return ir.VectorType(ir.FloatType(), lanes)


def _ints(lanes: int) -> ir.VectorType:
    return ir.VectorType(ir.IntType(32), lanes)


def _instruction(returns: types.Type, *takes: types.Type) -> Callable[[Callable], Callable[..., Any]]:
    """Makes of a function that writes LLVM code one that kernels may call, without its `builder`."""

    def declare(write: Callable) -> Callable:
        _declare(write, lambda given: signature(returns, *takes) if given == takes else None)

        @lower_builtin(write, *takes)
        def lower(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            value = write(builder, *arguments)
            return context.get_dummy_value() if returns is types.void else value

        return write

    return declare


def _elementwise(write: Callable, name: Callable | None = None) -> Callable[..., Any]:
    """The same for one that takes vectors of one length and returns another; a number stands for a vector of it."""
    arity = write.__code__.co_argcount - 1

    def typing(given: tuple[types.Type, ...]) -> Any:
        vectors = {x for x in given if isinstance(x, _Vector)}
        others = [x for x in given if not isinstance(x, (_Vector, types.Float))]
        return signature(*vectors, *given) if len(vectors) == 1 and not others and len(given) == arity else None

    _declare(name or write, typing)
    for takes in itertools.product((_Vector, types.Float), repeat=arity):
        if _Vector in takes:

            @lower_builtin(name or write, *takes)
            def lower(_: Any, builder: Any, sig: Any, arguments: Any) -> Any:
                lanes = sig.return_type.lanes
                return write(builder, *(_spread(builder, x, lanes) for x in arguments))

    return write


def _declare(key: Callable, typing: Callable) -> None:
    body = {"key": key, "generic": lambda _, given, __: typing(given)}
    infer_global(key, types.Function(type("Instruction", (AbstractTemplate,), body)))


_elementwise(lambda builder, a, b: builder.fadd(a, b), operator.add)
_elementwise(lambda builder, a, b: builder.fsub(a, b), operator.sub)
_elementwise(lambda builder, a, b: builder.fmul(a, b), operator.mul)
_elementwise(lambda builder, a, b: builder.fdiv(a, b), operator.truediv)


@_elementwise
def _fma(builder, a, b, c):
    """a b + c, rounded once."""
    return _call(builder, f"llvm.fma.v{a.type.count}f32", a.type, a, b, c)


@_elementwise
def _larger(builder, a, b):
    """The larger of both, and b where either is nan."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@_elementwise
def _smaller(builder, a, b):
    """The smaller of both, and b where either is nan."""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


@_elementwise
def _where_negative(builder, x, a, b):
    """a where x < 0, else b."""
    return builder.select(builder.fcmp_ordered("<", x, ir.Constant(x.type, [0.0] * x.type.count)), a, b)


@_elementwise
def _scale(builder, x, shifted):
    """x times two to the power that stands in the lowest bits of `shifted`."""
    ints = _ints(x.type.count)
    exponent = builder.shl(builder.bitcast(shifted, ints), ir.Constant(ints, [23] * ints.count))
    return builder.bitcast(builder.add(builder.bitcast(x, ints), exponent), x.type)


@_instruction(_narrow)
def _zeros(_):
    return ir.Constant(_floats(LANES), [0.0] * LANES)


@_instruction(_narrow, _address)
def _load(builder, address):
    return builder.load(_pointer(builder, address, LANES), align=_SIZE)


@_instruction(types.void, _address, _narrow)
def _store(builder, address, value):
    builder.store(value, _pointer(builder, address, LANES), align=_SIZE)


@_instruction(_narrow, _address, _count)
def _load_part(builder, address, live):
    """The first `live` lanes; nothing beyond them is touched, they are 0."""
    return _masked_load(builder, address, live, LANES)


@_instruction(types.void, _address, _narrow, _count)
def _store_part(builder, address, value, live):
    pointer = _pointer(builder, address, LANES)
    mask = _mask(builder, live, LANES)
    _call(builder, f"llvm.masked.store.v{LANES}f32.p0", ir.VoidType(), value, pointer, _int(_SIZE), mask)


@_instruction(_wide, _address, _count)
def _load_wide(builder, address, live):
    """The first `live` lanes; nothing beyond them is touched, they are 0."""
    with builder.if_else(builder.icmp_signed("<", live, ir.Constant(live.type, CHANNELS))) as (some, all_of_them):
        with some:
            part, after_some = _masked_load(builder, address, live, CHANNELS), builder.block
        with all_of_them:
            whole, after_all = builder.load(_pointer(builder, address, CHANNELS), align=_SIZE), builder.block
    value = builder.phi(_floats(CHANNELS))
    value.add_incoming(part, after_some)
    value.add_incoming(whole, after_all)
    return value


@_instruction(types.void, _address, _wide)
def _store_wide(builder, address, value):
    builder.store(value, _pointer(builder, address, CHANNELS), align=_SIZE)


@_instruction(types.void, _address, _wide, _count)
def _store_wide_part(builder, address, value, live):
    pointer = _pointer(builder, address, CHANNELS)
    with builder.if_else(builder.icmp_signed("<", live, ir.Constant(live.type, CHANNELS))) as (some, all_of_them):
        with some:
            mask = _mask(builder, live, CHANNELS)
            _call(builder, f"llvm.masked.store.v{CHANNELS}f32.p0", ir.VoidType(), value, pointer, _int(_SIZE), mask)
        with all_of_them:
            builder.store(value, pointer, align=_SIZE)


@_instruction(_number, _address)
def _load_number(builder, address):
    return builder.load(builder.inttoptr(address, ir.PointerType(ir.FloatType())))


@_instruction(types.void, _address, _number)
def _store_number(builder, address, value):
    builder.store(value, builder.inttoptr(address, ir.PointerType(ir.FloatType())))


@_instruction(types.void, _address)
def _expect(builder, address):
    """Asks for the cache lines of LANES numbers that will be read. The address may lie outside of all memory."""
    _prefetch(builder, address, 0)


@_instruction(types.void, _address)
def _expect_to_write(builder, address):
    """Asks for the cache lines of LANES numbers that will be written."""
    _prefetch(builder, address, 1)


@_instruction(types.void, _address, _narrow, _narrow)
def _accumulate(builder, address, a, b):
    """Adds the products, the upper half after the lower, to the LANES / 2 sums at an address."""
    half = LANES // 2
    pointer = _pointer(builder, address, half)
    total = builder.load(pointer, align=_SIZE)
    for first in (0, half):
        lanes = ir.Constant(_ints(half), list(range(first, first + half)))
        factors = (builder.shuffle_vector(x, x, lanes) for x in (a, b))
        total = _call(builder, f"llvm.fma.v{half}f32", total.type, *factors, total)
    builder.store(total, pointer, align=_SIZE)


@_instruction(_number, _address)
def _total(builder, address):
    """The sum of LANES / 2 numbers, always in one order: halves onto halves."""
    count = LANES // 2
    total = builder.load(_pointer(builder, address, count), align=_SIZE)
    while count > 1:
        count //= 2
        lower, upper = (ir.Constant(_ints(count), list(range(first, first + count))) for first in (0, count))
        total = builder.fadd(*(builder.shuffle_vector(total, total, lanes) for lanes in (lower, upper)))
    return builder.extract_element(total, _int(0))


@_instruction(types.int64, _address)
def _take(builder, address):
    """The number at an address, to which it adds one before any other thread can read it."""
    pointer = builder.inttoptr(address, ir.PointerType(ir.IntType(64)))
    return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "monotonic")


@_instruction(types.int32)
def _flush_tiny(builder):
    """From here on numbers below 2**-126 are 0 for this thread. Returns what `_restore` wants.

    States and adjoints fade through them wherever inputs or their gradients are 0, and x86 is ten times slower there.
    """
    if not _is_x86(builder):
        return _int(0)
    place = builder.alloca(ir.IntType(32))
    _call(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), place)
    mode = builder.load(place)
    # Of the control register the bits FTZ, for results, and DAZ, for what is given.
    builder.store(builder.or_(mode, _int(0x8040)), place)
    _call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), place)
    return mode


@_instruction(types.void, types.int32)
def _restore(builder, mode):
    if _is_x86(builder):
        place = builder.alloca(ir.IntType(32))
        builder.store(mode, place)
        _call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), place)


def _is_x86(builder: Any) -> bool:
    return builder.module.triple.startswith("x86_64")


def _int(value: int) -> ir.Constant:
    return ir.Constant(ir.IntType(32), value)


def _pointer(builder: Any, address: Any, lanes: int) -> Any:
    return builder.inttoptr(address, ir.PointerType(_floats(lanes)))


def _spread(builder: Any, x: Any, lanes: int) -> Any:
    """A number, of whatever type, in every lane; a vector stays."""
    if isinstance(x.type, ir.VectorType):
        return x
    if isinstance(x.type, ir.DoubleType):
        x = builder.fptrunc(x, ir.FloatType())
    kind = ir.VectorType(x.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), x, _int(0))
    return builder.shuffle_vector(first, first, ir.Constant(_ints(lanes), [0] * lanes))


def _mask(builder: Any, live: Any, lanes: int) -> Any:
    """Which lanes are among the first `live`."""
    bound = _spread(builder, builder.trunc(live, ir.IntType(32)), lanes)
    return builder.icmp_signed("<", ir.Constant(_ints(lanes), list(range(lanes))), bound)


def _masked_load(builder: Any, address: Any, live: Any, lanes: int) -> Any:
    dead = ir.Constant(_floats(lanes), [0.0] * lanes)
    arguments = (_pointer(builder, address, lanes), _int(_SIZE), _mask(builder, live, lanes), dead)
    return _call(builder, f"llvm.masked.load.v{lanes}f32.p0", dead.type, *arguments)


def _prefetch(builder: Any, address: Any, write: int) -> None:
    for line in range(0, _ROW, _LINE):
        pointer = builder.inttoptr(builder.add(address, ir.Constant(address.type, line)), ir.PointerType(ir.IntType(8)))
        # Into the second-level cache, and of data: the first level is full of what is being worked on.
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, _int(write), _int(2), _int(1))


def _call(builder: Any, intrinsic: str, returns: ir.Type, *arguments: Any) -> Any:
    kind = ir.FunctionType(returns, [argument.type for argument in arguments])
    return builder.call(get_or_insert_function(builder.module, kind, intrinsic), arguments)


# --- The functions, in vectors.

LOG2_E, LN_2 = math.log2(math.e), math.log(2)

#: Adding it rounds a number to an integer, which then stands in the lowest bits.
ROUNDER = 1.5 * 2**23

#: A step beyond which every decay is 0. Longer ones are kept from _exp2, whose argument must stay below 2**40.
LONGEST = 2.0**20

#: The largest rate |A|: with the longest step it stays within what _exp2 takes. Of larger ones the output is nan.
STEEPEST = 2.0**20

#: 2**f = 1 + f (P0 + f (P1 + ...)) for |f| <= 1/2, minimax: 2e-9 relative.
P0, P1, P2, P3, P4, P5 = (
    0.6931471824645996,
    0.24022647738456726,
    0.055503323674201965,
    0.00961843691766262,
    0.0013398875016719103,
    0.00015353361959569156,
)

#: log(1 + w) = w (1 + w (Q0 + w (Q1 + ...))) for 0 <= w <= 1, minimax: 8e-10 relative.
Q0, Q1, Q2, Q3, Q4, Q5, Q6, Q7, Q8, Q9 = (
    -0.4999998729096612,
    0.33332689782149033,
    -0.24988579074736197,
    0.19897932338053761,
    -0.16129336907883027,
    0.12467125213463542,
    -0.08307411002228118,
    0.04198139662814969,
    -0.013631496983719233,
    0.0020729508929434974,
)


@njit(forceinline=True)
def _exp2(a, b):
    """Two to the power of a b, to about one ulp, for |a b| < 2**40. Beyond 2**-125 and 2**127 it stays there."""
    shifted = _fma(a, b, ROUNDER)
    f = _fma(a, b, ROUNDER - shifted)
    p = _fma(P5, f, P4)
    p = _fma(p, f, P3)
    p = _fma(p, f, P2)
    p = _fma(p, f, P1)
    p = _fma(p, f, P0)
    p = _fma(p, f, 1.0)
    return _scale(p, _larger(ROUNDER - 125, _smaller(ROUNDER + 127, shifted)))


@njit(forceinline=True)
def _exp_minus_abs(x):
    return _exp2(_larger(-LONGEST, _smaller(x, 0.0 - x)), LOG2_E)


@njit(forceinline=True)
def _sigmoid(x):
    w = _exp_minus_abs(x)
    return _where_negative(x, w, 1.0) / (w + 1.0)


@njit(forceinline=True)
def _softplus(x, w):
    """log(1 + exp(x)), where w is exp(-|x|)."""
    p = _fma(Q9, w, Q8)
    p = _fma(p, w, Q7)
    p = _fma(p, w, Q6)
    p = _fma(p, w, Q5)
    p = _fma(p, w, Q4)
    p = _fma(p, w, Q3)
    p = _fma(p, w, Q2)
    p = _fma(p, w, Q1)
    p = _fma(p, w, Q0)
    p = _fma(p, w, 1.0)
    return _fma(p, w, _larger(0.0, x))


# --- The kernels. Addresses and strides are in bytes; threads share the tasks by taking the next from `following`.


@njit(forceinline=True)
def _clear(address, rows):
    for k in range(rows):
        _store(address + k * _ROW, _zeros())


@njit(forceinline=True)
def _gather_rates(A, rates, live, N):
    """A in powers of two, N vectors for each LANES channels, for which A_EN lies the wrong way."""
    _clear(rates, CHANNELS // LANES * N)
    for e in range(live):
        for n in range(N):
            rate = rates + (e // LANES * N + n) * _ROW + e % LANES * _SIZE
            _store_number(rate, _load_number(A + (e * N + n) * _SIZE) * types.float32(LOG2_E))


@njit(forceinline=True)
def _add_compensated(total, part, count):
    """Adds `count` vectors to totals that keep their rounding errors beside them (Kahan), and clears the parts."""
    for k in range(count):
        at = total + 2 * k * _ROW
        old = _load(at)
        term = _load(part + k * _ROW) - _load(at + _ROW)
        new = old + term
        _store(at, new)
        _store(at + _ROW, (new - old) - term)
    _clear(part, count)


def _forward(
    following, tasks, scratch, u, u_b, u_l, dt, dt_b, dt_l, A, B, B_b, B_l, C, C_b, C_l, D, z, z_b, z_l, bias,
    y, starts, keep, L, E, N, chunk, reverse,
):  # fmt: skip
    blocks = (E + CHANNELS - 1) // CHANNELS
    chunks = (L + chunk - 1) // chunk
    rates = scratch
    states = rates + N * _WIDE_ROW
    steps = states + N * _WIDE_ROW
    inputs = steps + chunk * _WIDE_ROW
    skips = inputs + chunk * _WIDE_ROW
    gates = skips + chunk * _WIDE_ROW
    mode = _flush_tiny()
    while True:
        task = _take(following)
        if task >= tasks:
            break
        b = task // blocks
        block = task % blocks
        e = block * _WIDE_ROW
        live = min(CHANNELS, E - block * CHANNELS)
        groups = (live + LANES - 1) // LANES
        _gather_rates(A + e * N, rates, live, N)
        _clear(states, groups * N)
        for c in range(chunks):
            i_first = c * chunk
            size = min(chunk, L - i_first)
            for i in range(size):
                t = L - 1 - i_first - i if reverse else i_first + i
                s = _load_wide(dt + b * dt_b + t * dt_l + e, live) + _load_wide(bias + e, live)
                d = _softplus(s, _exp_minus_abs(s))
                u_t = _load_wide(u + b * u_b + t * u_l + e, live)
                _store_wide(steps + i * _WIDE_ROW, _smaller(LONGEST, d))
                _store_wide(inputs + i * _WIDE_ROW, d * u_t)
                _store_wide(skips + i * _WIDE_ROW, u_t * _load_wide(D + e, live))
                z_t = _load_wide(z + b * z_b + t * z_l + e, live)
                _store_wide(gates + i * _WIDE_ROW, z_t * _sigmoid(z_t))
            for g in range(groups):
                rate = rates + g * N * _ROW
                state = states + g * N * _ROW
                if keep:
                    start = starts + ((task * chunks + c) * CHANNELS // LANES + g) * N * _ROW
                    for n in range(N):
                        _store(start + n * _ROW, _load(state + n * _ROW))
                for i in range(size):
                    t = L - 1 - i_first - i if reverse else i_first + i
                    at = i * _WIDE_ROW + g * _ROW
                    d = _load(steps + at)
                    x = _load(inputs + at)
                    t_next = t - chunk if reverse else t + chunk
                    here = e + g * _ROW
                    _expect(u + b * u_b + t_next * u_l + here)
                    _expect(dt + b * dt_b + t_next * dt_l + here)
                    _expect(z + b * z_b + t_next * z_l + here)
                    _expect_to_write(y + (b * L + t_next) * E * _SIZE + here)
                    total = _load(skips + at)
                    B_t = B + b * B_b + t * B_l
                    C_t = C + b * C_b + t * C_l
                    for n in range(N):
                        decay = _exp2(d, _load(rate + n * _ROW))
                        h = _fma(decay, _load(state + n * _ROW), x * _load_number(B_t + n * _SIZE))
                        _store(state + n * _ROW, h)
                        total = _fma(h, _load_number(C_t + n * _SIZE), total)
                    _store_part(y + (b * L + t) * E * _SIZE + here, total * _load(gates + at), live - g * LANES)
    _restore(mode)


def _backward(
    following, tasks, scratch, u, u_b, u_l, dt, dt_b, dt_l, A, B, B_b, B_l, C, C_b, C_l, D, z, z_b, z_l, bias,
    dy, dy_b, dy_l, starts, du, ddt, dz, dB, dC, dparameters, L, E, N, chunk, reverse,
):  # fmt: skip
    blocks = (E + CHANNELS - 1) // CHANNELS
    chunks = (L + chunk - 1) // chunk
    rates = scratch
    carries = rates + N * _WIDE_ROW
    # The sums over tokens of the gradients of A, D and the bias: of a chunk, and of all with their rounding errors.
    parts = carries + N * _WIDE_ROW
    totals = parts + (N + 2) * _ROW
    steps = totals + 2 * (N + 2) * _WIDE_ROW
    slopes = steps + chunk * _WIDE_ROW
    inputs = slopes + chunk * _WIDE_ROW
    dys = inputs + chunk * _WIDE_ROW
    dzs = dys + chunk * _WIDE_ROW
    decays = dzs + chunk * _WIDE_ROW
    states = decays + chunk * N * _ROW
    dBs = states + (chunk + 1) * N * _ROW
    dCs = dBs + chunk * N * _ROW // 2
    mode = _flush_tiny()
    while True:
        task = _take(following)
        if task >= tasks:
            break
        b = task // blocks
        block = task % blocks
        e = block * _WIDE_ROW
        live = min(CHANNELS, E - block * CHANNELS)
        groups = (live + LANES - 1) // LANES
        _gather_rates(A + e * N, rates, live, N)
        _clear(carries, groups * N)
        _clear(parts, N + 2)
        _clear(totals, groups * (N + 2) * 2)
        for c in range(chunks - 1, -1, -1):
            i_first = c * chunk
            size = min(chunk, L - i_first)
            _clear(dBs, chunk * N)
            for i in range(size):
                t = L - 1 - i_first - i if reverse else i_first + i
                s = _load_wide(dt + b * dt_b + t * dt_l + e, live) + _load_wide(bias + e, live)
                w = _exp_minus_abs(s)
                _store_wide(steps + i * _WIDE_ROW, _softplus(s, w))
                _store_wide(inputs + i * _WIDE_ROW, _load_wide(u + b * u_b + t * u_l + e, live))
                # Both sigmoids, of s and of z, from one division, which takes as long as ten products.
                z_t = _load_wide(z + b * z_b + t * z_l + e, live)
                w_z = _exp_minus_abs(z_t)
                ratio = 1.0 / ((w + 1.0) * (w_z + 1.0))
                _store_wide(slopes + i * _WIDE_ROW, _where_negative(s, w, 1.0) * ((w_z + 1.0) * ratio))
                share = (w + 1.0) * ratio
                sigmoid = _where_negative(z_t, w_z, 1.0) * share
                silu = z_t * sigmoid
                # 1 - sigmoid as its own quotient: the difference would lose what a large z makes large again.
                rest = _where_negative(z_t, 1.0, w_z) * share
                dy_t = _load_wide(dy + b * dy_b + t * dy_l + e, live)
                _store_wide(dys + i * _WIDE_ROW, dy_t * silu)
                _store_wide(dzs + i * _WIDE_ROW, dy_t * _fma(silu, rest, sigmoid))
            for g in range(groups):
                rate = rates + g * N * _ROW
                carry = carries + g * N * _ROW
                start = starts + ((task * chunks + c) * CHANNELS // LANES + g) * N * _ROW
                for n in range(N):
                    _store(states + n * _ROW, _load(start + n * _ROW))
                alive = live - g * LANES
                D_g = _load_part(D + e + g * _ROW, alive)
                for i in range(size):
                    t = L - 1 - i_first - i if reverse else i_first + i
                    at = i * _WIDE_ROW + g * _ROW
                    u_t = _load(inputs + at)
                    d = _load(steps + at)
                    x = d * u_t
                    d = _smaller(LONGEST, d)
                    B_t = B + b * B_b + t * B_l
                    C_t = C + b * C_b + t * C_l
                    # The chunk that comes next is the one before, in the order of the tokens.
                    t_next = t + chunk if reverse else t - chunk
                    here = e + g * _ROW
                    _expect(u + b * u_b + t_next * u_l + here)
                    _expect(dt + b * dt_b + t_next * dt_l + here)
                    _expect(z + b * z_b + t_next * z_l + here)
                    _expect(dy + b * dy_b + t_next * dy_l + here)
                    token = (b * L + t) * E * _SIZE + here
                    _expect_to_write(du + token)
                    _expect_to_write(ddt + token)
                    _expect_to_write(dz + (b * L + t_next) * E * _SIZE + here)
                    total = D_g * u_t
                    decay_t = decays + i * N * _ROW
                    state_t = states + i * N * _ROW
                    for n in range(N):
                        decay = _exp2(d, _load(rate + n * _ROW))
                        h = _fma(decay, _load(state_t + n * _ROW), x * _load_number(B_t + n * _SIZE))
                        _store(decay_t + n * _ROW, decay)
                        _store(state_t + (N + n) * _ROW, h)
                        total = _fma(h, _load_number(C_t + n * _SIZE), total)
                    _store_part(dz + token, total * _load(dzs + at), alive)
                dD = _zeros()
                dbias = _zeros()
                for i in range(size - 1, -1, -1):
                    t = L - 1 - i_first - i if reverse else i_first + i
                    at = i * _WIDE_ROW + g * _ROW
                    u_t = _load(inputs + at)
                    d = _load(steps + at)
                    dy_t = _load(dys + at)
                    x = d * u_t
                    B_t = B + b * B_b + t * B_l
                    C_t = C + b * C_b + t * C_l
                    decay_t = decays + i * N * _ROW
                    state_t = states + i * N * _ROW
                    dx = _zeros()
                    dd = _zeros()
                    for n in range(N):
                        g_n = _fma(dy_t, _load_number(C_t + n * _SIZE), _load(carry + n * _ROW))
                        _accumulate(dBs + (i * N + n) * _ROW // 2, g_n, x)
                        _accumulate(dCs + (i * N + n) * _ROW // 2, _load(state_t + (N + n) * _ROW), dy_t)
                        dx = _fma(g_n, _load_number(B_t + n * _SIZE), dx)
                        g_n = g_n * _load(decay_t + n * _ROW)
                        _store(carry + n * _ROW, g_n)
                        # Of the exponent d A.
                        dp = g_n * _load(state_t + n * _ROW)
                        dd = _fma(dp, _load(rate + n * _ROW), dd)
                        _store(parts + n * _ROW, _fma(dp, d, _load(parts + n * _ROW)))
                    ddt_t = _fma(dd, LN_2, dx * u_t) * _load(slopes + at)
                    token = (b * L + t) * E * _SIZE + e + g * _ROW
                    _store_part(ddt + token, ddt_t, alive)
                    _store_part(du + token, _fma(dx, d, dy_t * D_g), alive)
                    dD = _fma(dy_t, u_t, dD)
                    dbias = dbias + ddt_t
                _store(parts + N * _ROW, dD)
                _store(parts + (N + 1) * _ROW, dbias)
                _add_compensated(totals + g * (N + 2) * 2 * _ROW, parts, N + 2)
            for i in range(size):
                t = L - 1 - i_first - i if reverse else i_first + i
                for n in range(N):
                    at = ((task * L + t) * N + n) * _SIZE
                    _store_number(dB + at, _total(dBs + (i * N + n) * _ROW // 2))
                    _store_number(dC + at, _total(dCs + (i * N + n) * _ROW // 2))
        for g in range(groups):
            for n in range(N + 2):
                total = _load(totals + (g * (N + 2) + n) * 2 * _ROW)
                _store(dparameters + (task * (N + 2) + n) * _WIDE_ROW + g * _ROW, total)
    _restore(mode)


def _forward_conv(following, tasks, taps, u, u_b, u_l, weight, bias, y, L, E, K, reverse):
    blocks = (E + CHANNELS - 1) // CHANNELS
    mode = _flush_tiny()
    while True:
        task = _take(following)
        if task >= tasks:
            break
        b = task // blocks
        block = task % blocks
        e = block * _WIDE_ROW
        live = min(CHANNELS, E - block * CHANNELS)
        u_e = u + b * u_b + e
        _gather_taps(weight + e * K, taps, live, K)
        for i in range(L):
            t = L - 1 - i if reverse else i
            t_next = t - AHEAD if reverse else t + AHEAD
            for g in range(0, live, LANES):
                _expect(u_e + t_next * u_l + g * _SIZE)
                _expect_to_write(y + (b * L + t_next) * E * _SIZE + e + g * _SIZE)
            s = _convolve(u_e, u_l, taps, bias + e, live, L, K, i, reverse)
            _store_wide_part(y + (b * L + t) * E * _SIZE + e, s * _sigmoid(s), live)
    _restore(mode)


def _backward_conv(
    following, tasks, taps, u, u_b, u_l, weight, bias, dy, dy_b, dy_l, du, dparameters, L, E, K, chunk, reverse,
):  # fmt: skip
    blocks = (E + CHANNELS - 1) // CHANNELS
    chunks = (L + chunk - 1) // chunk
    # The sums over tokens of the gradients of the taps and the bias: of a chunk, and of all with their rounding errors.
    parts = taps + K * _WIDE_ROW
    totals = parts + (K + 1) * _WIDE_ROW
    # Gradients of what enters the SiLU, of a chunk and of the K - 1 tokens after it.
    slopes = totals + 2 * (K + 1) * _WIDE_ROW
    mode = _flush_tiny()
    while True:
        task = _take(following)
        if task >= tasks:
            break
        b = task // blocks
        block = task % blocks
        e = block * _WIDE_ROW
        live = min(CHANNELS, E - block * CHANNELS)
        u_e = u + b * u_b + e
        _gather_taps(weight + e * K, taps, live, K)
        _clear(parts, 3 * (K + 1) * (CHANNELS // LANES))
        _clear(slopes, (chunk + K - 1) * (CHANNELS // LANES))
        for c in range(chunks - 1, -1, -1):
            i_first = c * chunk
            size = min(chunk, L - i_first)
            for k in range(K - 2, -1, -1):
                _store_wide(slopes + (size + k) * _WIDE_ROW, _load_wide(slopes + k * _WIDE_ROW, CHANNELS))
            for i in range(size):
                t = L - 1 - i_first - i if reverse else i_first + i
                t_next = t + chunk if reverse else t - chunk
                for g in range(0, live, LANES):
                    _expect(u_e + t_next * u_l + g * _SIZE)
                    _expect(dy + b * dy_b + t_next * dy_l + e + g * _SIZE)
                    _expect_to_write(du + (b * L + t) * E * _SIZE + e + g * _SIZE)
                s = _convolve(u_e, u_l, taps, bias + e, live, L, K, i_first + i, reverse)
                w = _exp_minus_abs(s)
                share = 1.0 / (w + 1.0)
                sigmoid = _where_negative(s, w, 1.0) * share
                rest = _where_negative(s, 1.0, w) * share
                ds = _load_wide(dy + b * dy_b + t * dy_l + e, live) * _fma(s * sigmoid, rest, sigmoid)
                _store_wide(slopes + i * _WIDE_ROW, ds)
                for k in range(max(0, K - 1 - i_first - i), K):
                    u_k = _load_wide(u_e + (t + K - 1 - k if reverse else t - K + 1 + k) * u_l, live)
                    part = parts + k * _WIDE_ROW
                    _store_wide(part, _fma(ds, u_k, _load_wide(part, CHANNELS)))
                part = parts + K * _WIDE_ROW
                _store_wide(part, ds + _load_wide(part, CHANNELS))
            for i in range(size):
                t = L - 1 - i_first - i if reverse else i_first + i
                du_t = _load_wide(taps, CHANNELS) * _load_wide(slopes + (i + K - 1) * _WIDE_ROW, CHANNELS)
                for k in range(1, K):
                    ds = _load_wide(slopes + (i + K - 1 - k) * _WIDE_ROW, CHANNELS)
                    du_t = _fma(_load_wide(taps + k * _WIDE_ROW, CHANNELS), ds, du_t)
                _store_wide_part(du + (b * L + t) * E * _SIZE + e, du_t, live)
            _add_compensated(totals, parts, (K + 1) * (CHANNELS // LANES))
        for k in range(K + 1):
            for g in range(CHANNELS // LANES):
                total = _load(totals + (k * (CHANNELS // LANES) + g) * 2 * _ROW)
                _store(dparameters + (task * (K + 1) + k) * _WIDE_ROW + g * _ROW, total)
    _restore(mode)


@njit(forceinline=True)
def _gather_taps(weight, taps, live, K):
    """The weights [E, K] as K rows of channels."""
    _clear(taps, K * (CHANNELS // LANES))
    for e in range(live):
        for k in range(K):
            _store_number(taps + k * _WIDE_ROW + e * _SIZE, _load_number(weight + (e * K + k) * _SIZE))


@njit(forceinline=True)
def _convolve(u, u_l, taps, bias, live, L, K, i, reverse):
    """The convolution at the token that comes as the i-th."""
    s = _load_wide(bias, live)
    for k in range(max(0, K - 1 - i), K):
        i_k = i - K + 1 + k
        t = L - 1 - i_k if reverse else i_k
        s = _fma(_load_wide(taps + k * _WIDE_ROW, CHANNELS), _load_wide(u + t * u_l, live), s)
    return s


def _sum_parts(parts, sums, outer, count, inner):
    """The sums [outer, inner] of the parts [outer, count, inner], one after the other and compensated (Kahan)."""
    for o in range(outer):
        for first in range(0, inner, LANES):
            live = inner - first
            total = _zeros()
            lost = _zeros()
            for c in range(count):
                term = _load_part(parts + ((o * count + c) * inner + first) * _SIZE, live) - lost
                new = total + term
                lost = (new - total) - term
                total = new
            _store_part(sums + (o * inner + first) * _SIZE, total, live)


# --- Compiled once, kept on disk.

#: What it takes to compile the kernels, on a core of 2023.
COMPILE_S = 5

_lock = threading.Lock()
_compiled: dict[Callable, Callable] = {}


class _Announcement(event.Listener):
    """Says that numba compiles, which it does not where it finds its work of an earlier day on the disk."""

    def __init__(self) -> None:
        self.said = False

    def on_start(self, event: Any) -> None:  # noqa: ARG002  (the contract's)
        if not self.said:
            logger.warning("compiling the CPU scan, once on this machine, about %d s", COMPILE_S)
        self.said = True

    def on_end(self, event: Any) -> None:
        pass


def _kernel(function: Callable) -> Callable:
    """The kernel, compiled for addresses and sizes in int64, the only types that it is ever called with."""
    with _lock:
        if not _compiled:
            kernels = (_forward, _backward, _forward_conv, _backward_conv, _sum_parts)
            with event.install_listener("numba:compile", _Announcement()):
                _compiled.update({kernel: _compile(kernel) for kernel in kernels})
        return _compiled[function]


def _compile(function: Callable) -> Callable:
    given = types.void(*(types.int64,) * function.__code__.co_argcount)
    try:
        return njit([given], cache=True, nogil=True, error_model="numpy")(function)
    except (RuntimeError, OSError) as error:
        logger.warning("the compiled CPU scan cannot be kept for other processes: %s", error)
        return njit([given], nogil=True, error_model="numpy")(function)


# --- Threads.

#: Steps of the recurrence, or as much other work, for which it pays to wake a thread: some 0.15 ms.
GRAIN = 2**19

_pool: ThreadPoolExecutor | None = None


def _forget_threads() -> None:
    """A forked process has none of its parent's threads, and whoever held the lock is not among them."""
    global _lock, _pool
    _lock, _pool = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def _run(function: Callable, *arguments: int, tasks: int, work: int, scratch: int) -> None:
    """All tasks, each by the next free thread. `work` is what they are together; `scratch` the floats of a thread."""
    kernel = _kernel(function)
    following = torch.zeros(1, dtype=torch.int64, device="cpu")

    def take_tasks() -> None:
        memory = torch.empty(scratch, dtype=torch.float32, device="cpu")
        kernel(following.data_ptr(), tasks, memory.data_ptr(), *arguments)

    others = min(torch.get_num_threads(), tasks, work // GRAIN) - 1
    helpers: list[Future[None]] = []
    try:
        for _ in range(others):
            helpers.append(_threads(others).submit(take_tasks))
        take_tasks()
    finally:
        # Whatever interrupts this thread, the caller must not free what others still work on.
        wait([helper for helper in helpers if not helper.cancel()])
    for helper in helpers:
        if not helper.cancelled():
            helper.result()


def _threads(count: int) -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None or _pool._max_workers < count:
            _pool = ThreadPoolExecutor(count, thread_name_prefix="helix-scan")
        return _pool


# --- The operators. They are registered without their gradients, which would cost every call 0.1 ms more than the two
# Functions around them; torch.compile sees through both.


def chunk_of(state: int) -> int:
    """Tokens in a chunk of the scan: what the backward recomputes of one stays in the caches next to the core."""
    return 16 if state <= 8 else 32


def _blocks(channels: int) -> int:
    return -(-channels // CHANNELS)


def _starts_shape(u: Tensor, A: Tensor, *, keep: bool) -> tuple[int, ...]:
    (batch, tokens, channels), state = u.shape, A.shape[1]
    return (batch, _blocks(channels), -(-tokens // chunk_of(state)), CHANNELS * state) if keep else (0,)


def _rows(x_BLX: Tensor) -> Tensor:
    """The tensor, or a copy where its last dimension does not lie side by side."""
    return x_BLX if x_BLX.stride(-1) == 1 or x_BLX.shape[-1] == 1 else x_BLX.contiguous()


def _where(*tensors: Tensor) -> list[int]:
    """What the kernels take of tensors: the address, and the strides in bytes of those that run along the tokens."""
    strides = ([x.stride(0) * _SIZE, x.stride(1) * _SIZE] if x.ndim == 3 else [] for x in tensors)
    return [number for x, given in zip(tensors, strides, strict=True) for number in (x.data_ptr(), *given)]


@torch.library.custom_op("helix::selective_scan", mutates_args=(), device_types="cpu")
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
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y [B, L, E], and with `keep` the states at the start of every chunk, which the backward needs."""
    (batch, tokens, channels), state, chunk = u.shape, A.shape[1], chunk_of(A.shape[1])
    inputs = [_rows(x) for x in (u, dt)] + [A.contiguous()] + [_rows(x) for x in (B, C)]
    inputs += [D.contiguous(), _rows(z), dt_bias.contiguous()]
    y = u.new_empty(u.shape)
    starts = u.new_empty(_starts_shape(u, A, keep=keep))
    if A.numel() and not float(A.abs().max()) <= STEEPEST:
        # Such a model has diverged, and what the kernel would make of it could look like numbers.
        return y.fill_(math.nan), starts.fill_(math.nan)
    _run(
        _forward,
        *_where(*inputs),
        *(y.data_ptr(), starts.data_ptr(), int(keep)),
        *(tokens, channels, state, chunk, int(reverse)),
        tasks=batch * _blocks(channels),
        work=u.numel() * state,
        scratch=CHANNELS * (2 * state + 4 * chunk),
    )
    return y, starts


@selective_scan_forward.register_fake
def _(u, dt, A, B, C, D, z, dt_bias, reverse, keep):  # noqa: ARG001  (the contract's)
    return u.new_empty(u.shape), u.new_empty(_starts_shape(u, A, keep=keep))


@torch.library.custom_op("helix::selective_scan_backward", mutates_args=(), device_types="cpu")
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the eight inputs, in their order."""
    (batch, tokens, channels), state, chunk = u.shape, A.shape[1], chunk_of(A.shape[1])
    inputs = [_rows(x) for x in (u, dt)] + [A.contiguous()] + [_rows(x) for x in (B, C)]
    inputs += [D.contiguous(), _rows(z), dt_bias.contiguous(), _rows(dy)]
    du, ddt, dz = (u.new_empty(u.shape) for _ in range(3))
    dB, dC = (u.new_empty(batch, _blocks(channels), tokens, state) for _ in range(2))
    dparameters = u.new_empty(batch, _blocks(channels), state + 2, CHANNELS)
    _run(
        _backward,
        *_where(*inputs),
        *(x.data_ptr() for x in (starts, du, ddt, dz, dB, dC, dparameters)),
        *(tokens, channels, state, chunk, int(reverse)),
        tasks=batch * _blocks(channels),
        work=2 * u.numel() * state,
        scratch=CHANNELS * (4 * state + 4 + 5 * chunk) + LANES * (state + 2 + (3 * chunk + 1) * state),
    )
    sums = _sum(dparameters, 0)
    dA, dD, dbias = (_columns(sums, rows, channels) for rows in (slice(state), state, state + 1))
    return du, ddt, dA, _sum(dB, 1), _sum(dC, 1), dD, dz, dbias


@selective_scan_backward.register_fake
def _(dy, starts, u, dt, A, B, C, D, z, dt_bias, reverse):  # noqa: ARG001  (the contract's)
    return tuple(x.new_empty(x.shape) for x in (u, dt, A, B, C, D, z, dt_bias))


def _backward_workspace(dy: Tensor, starts: Tensor, u: Tensor, dt: Tensor, A: Tensor, *_: object) -> int:  # noqa: ARG001  (the operator's)
    """The gradients of B and C by blocks of channels, before they are summed; one block is the gradient itself."""
    (batch, tokens, channels), state = u.shape, A.shape[1]
    blocks = _blocks(channels)
    return 2 * _SIZE * batch * blocks * tokens * state if blocks > 1 else 0


#: What an operator holds beside its inputs and results, by its name: for helix.training.memory.
WORKSPACE_BYTES: dict[str, Callable[..., int]] = {"helix::selective_scan_backward": _backward_workspace}


@torch.library.custom_op("helix::conv_silu", mutates_args=(), device_types="cpu")
def conv_silu_forward(u: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """y [B, L, E] from u [B, L, E] and weight [E, K]."""
    (batch, tokens, channels), taps = u.shape, weight.shape[1]
    inputs = [_rows(u), weight.contiguous(), bias.contiguous()]
    y = u.new_empty(u.shape)
    _run(
        _forward_conv,
        *(*_where(*inputs), y.data_ptr()),
        *(tokens, channels, taps, int(reverse)),
        tasks=batch * _blocks(channels),
        work=4 * u.numel(),
        scratch=CHANNELS * taps,
    )
    return y


@conv_silu_forward.register_fake
def _(u, weight, bias, reverse):  # noqa: ARG001  (the contract's)
    return u.new_empty(u.shape)


@torch.library.custom_op("helix::conv_silu_backward", mutates_args=(), device_types="cpu")
def conv_silu_backward(
    dy: Tensor, u: Tensor, weight: Tensor, bias: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of u, weight and bias."""
    (batch, tokens, channels), taps = u.shape, weight.shape[1]
    chunk = max(CONV_CHUNK, taps)
    inputs = [_rows(u), weight.contiguous(), bias.contiguous(), _rows(dy)]
    du = u.new_empty(u.shape)
    dparameters = u.new_empty(batch, _blocks(channels), taps + 1, CHANNELS)
    _run(
        _backward_conv,
        *(*_where(*inputs), du.data_ptr(), dparameters.data_ptr()),
        *(tokens, channels, taps, chunk, int(reverse)),
        tasks=batch * _blocks(channels),
        work=8 * u.numel(),
        scratch=CHANNELS * (5 * taps + 2 + chunk),
    )
    sums = _sum(dparameters, 0)
    return du, _columns(sums, slice(taps), channels), _columns(sums, taps, channels)


@conv_silu_backward.register_fake
def _(dy, u, weight, bias, reverse):  # noqa: ARG001  (the contract's)
    return tuple(x.new_empty(x.shape) for x in (u, weight, bias))


def _sum(parts: Tensor, dim: int) -> Tensor:
    """The sum over a dimension, always in its order; torch's may depend on its threads."""
    if parts.shape[dim] == 1:
        return parts.squeeze(dim)
    sums = parts.new_empty(parts.shape[:dim] + parts.shape[dim + 1 :])
    sizes = (math.prod(parts.shape[:dim]), parts.shape[dim], math.prod(parts.shape[dim + 1 :]))
    _kernel(_sum_parts)(parts.data_ptr(), sums.data_ptr(), *sizes)
    return sums


def _columns(sums: Tensor, rows: slice | int, channels: int) -> Tensor:
    """Of [blocks, rows, CHANNELS] a row as the gradient [E], or several as [E, rows]."""
    return sums.transpose(1, 2).flatten(0, 1)[:channels, rows].clone(memory_format=torch.contiguous_format)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, ctx.reverse = inputs
        y, starts = selective_scan_forward(*inputs, keep=True)
        ctx.save_for_backward(starts, *tensors)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        return *selective_scan_backward(dy, *ctx.saved_tensors, ctx.reverse), None


class _ConvSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, ctx.reverse = inputs
        ctx.save_for_backward(*tensors)
        return conv_silu_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        return *conv_silu_backward(dy, *ctx.saved_tensors, ctx.reverse), None


def _tracked(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


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
    """y_BLE. All tensors are float32 and on the CPU."""
    tensors = (u_BLE, dt_BLE, A_EN, B_BLN, C_BLN, D_E, z_BLE, dt_bias_E)
    require_agreement(tensors, SCAN_SHAPES)
    if _tracked(tensors):
        return _Scan.apply(*tensors, reverse)
    return selective_scan_forward(*tensors, reverse, keep=False)[0]


def conv_silu(u_BLE: Tensor, weight_EK: Tensor, bias_E: Tensor, reverse: bool) -> Tensor:
    """silu of each channel's convolution over its own past tokens, or with `reverse` over those to come.

    All tensors are float32 and on the CPU. Of the results in between nothing is kept.
    """
    tensors = (u_BLE, weight_EK, bias_E)
    require_agreement(tensors, CONV_SHAPES)
    if _tracked(tensors):
        return _ConvSilu.apply(*tensors, reverse)
    return conv_silu_forward(*tensors, reverse)
