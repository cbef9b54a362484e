"""The selective scan on a CPU, forward and backward, as vector code that numba compiles once and keeps on disk.

The equations and the meaning of the arguments stand in helix.models.scan. What differs is the order of the work: a task
is one batch entry and VECTORS x LANES channels. The states of its channels run along the tokens and are kept at the start
of every chunk only; the backward takes the chunks from the last to the first, recomputes the states of one and runs the
adjoint recurrence over it.

Tasks are fixed by the shapes, and sums over tasks are taken in their order, so no number depends on how many threads
there are. The threads are plain ones that call compiled code without the GIL, torch.get_num_threads() of them. Numba's own
threading layers would not do: 'omp' aborts a process that was forked after its first use, and 'workqueue' aborts one that
enters it twice at a time.

Legend: B batch, L tokens, E channels, N state.
"""

import itertools
import logging
import math
import operator
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from llvmlite import ir
from numba import njit, types
from numba.core import event
from numba.core.cgutils import get_or_insert_function
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model
from torch import Tensor

logger = logging.getLogger(__name__)

#: Channels in a vector. One register of AVX-512, two of AVX2, four of NEON: the same numbers on all of them.
LANES = 16

#: Vectors in a task: as many as share one sum of the gradients of B and C.
VECTORS = 8

_SIZE = 4
_ROW = LANES * _SIZE


# --- A vector of LANES floats as a type that numba knows, and what can be done with it.


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"Vector{LANES}")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any):
        super().__init__(dmm, fe_type, _FLOATS)


_vector, _address, _int, _float = _Vector(), types.int64, types.int64, types.float32


def _instruction(returns: types.Type, *takes: types.Type, name: Callable | None = None) -> Callable:
    """Makes of a function that writes LLVM code one that kernels may call, by its own name or by another."""

    def declare(write: Callable) -> Callable:
        key = name or write
        typing = {"key": key, "cases": [signature(returns, *takes)]}
        infer_global(key, types.Function(type("Instruction", (ConcreteTemplate,), typing)))

        @lower_builtin(key, *takes)
        def lower(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            value = write(builder, *arguments)
            return context.get_dummy_value() if returns is types.void else value

        return write

    return declare


_instruction(_vector, _vector, _vector, name=operator.add)(lambda builder, a, b: builder.fadd(a, b))
_instruction(_vector, _vector, _vector, name=operator.sub)(lambda builder, a, b: builder.fsub(a, b))
_instruction(_vector, _vector, _vector, name=operator.mul)(lambda builder, a, b: builder.fmul(a, b))
_instruction(_vector, _vector, _vector, name=operator.truediv)(lambda builder, a, b: builder.fdiv(a, b))


@_instruction(_vector, _address)
def _load(builder, address):
    return builder.load(builder.inttoptr(address, _POINTER), align=_SIZE)


@_instruction(types.void, _address, _vector)
def _store(builder, address, value):
    builder.store(value, builder.inttoptr(address, _POINTER), align=_SIZE)


@_instruction(_vector, _address, _int)
def _load_part(builder, address, live):
    """The first `live` lanes; nothing beyond them is touched, they are 0."""
    arguments = [builder.inttoptr(address, _POINTER), _constant(_SIZE), _mask(builder, live), _all_of(0.0)]
    return _call(builder, f"llvm.masked.load.v{LANES}f32.p0", _FLOATS, arguments)


@_instruction(types.void, _address, _vector, _int)
def _store_part(builder, address, value, live):
    arguments = [value, builder.inttoptr(address, _POINTER), _constant(_SIZE), _mask(builder, live)]
    _call(builder, f"llvm.masked.store.v{LANES}f32.p0", ir.VoidType(), arguments)


@_instruction(_float, _address)
def _load_scalar(builder, address):
    return builder.load(builder.inttoptr(address, ir.PointerType(ir.FloatType())))


@_instruction(types.void, _address, _float)
def _store_scalar(builder, address, value):
    builder.store(value, builder.inttoptr(address, ir.PointerType(ir.FloatType())))


@_instruction(_vector, _float)
def _all(builder, value):
    """The number in every lane."""
    return _spread(builder, value, _FLOATS)


@_instruction(_vector, _vector, _vector, _vector)
def _fma(builder, a, b, c):
    """a b + c, rounded once."""
    return _call(builder, f"llvm.fma.v{LANES}f32", _FLOATS, [a, b, c])


@_instruction(_vector, _vector, _vector)
def _larger(builder, a, b):
    """The larger of both, and b where either is nan."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@_instruction(_vector, _vector, _vector)
def _smaller(builder, a, b):
    """The smaller of both, and b where either is nan."""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


@_instruction(_vector, _vector, _vector, _vector)
def _where_negative(builder, x, a, b):
    """a where x < 0, else b."""
    return builder.select(builder.fcmp_ordered("<", x, _all_of(0.0)), a, b)


@_instruction(_vector, _vector, _vector)
def _scale(builder, x, shifted):
    """x times two to the power that stands in the lowest bits of `shifted`."""
    exponent = builder.shl(builder.bitcast(shifted, _INTS), ir.Constant(_INTS, [23] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(x, _INTS), exponent), _FLOATS)


@_instruction(_float, _vector)
def _total(builder, x):
    """The sum of the lanes, always in one order: halves onto halves."""
    half = LANES // 2
    while half:
        upper = ir.Constant(_INTS, [(lane + half) % LANES for lane in range(LANES)])
        x = builder.fadd(x, builder.shuffle_vector(x, x, upper))
        half //= 2
    return builder.extract_element(x, _constant(0))


_FLOATS, _INTS, _BITS = (ir.VectorType(kind, LANES) for kind in (ir.FloatType(), ir.IntType(32), ir.IntType(1)))
_POINTER = ir.PointerType(_FLOATS)


def _constant(value: int) -> ir.Constant:
    return ir.Constant(ir.IntType(32), value)


def _all_of(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [value] * LANES)


def _spread(builder: Any, scalar: Any, kind: ir.VectorType) -> Any:
    empty = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(empty, scalar, _constant(0))
    return builder.shuffle_vector(first, empty, ir.Constant(_INTS, [0] * LANES))


def _mask(builder: Any, live: Any) -> Any:
    """Which lanes are among the first `live`."""
    bound = _spread(builder, builder.trunc(live, ir.IntType(32)), _INTS)
    return builder.icmp_signed("<", ir.Constant(_INTS, list(range(LANES))), bound)


def _call(builder: Any, intrinsic: str, returns: ir.Type, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(returns, [argument.type for argument in arguments])
    return builder.call(get_or_insert_function(builder.module, kind, intrinsic), arguments)


# --- The functions, in vectors.

LOG2_E, LN_2 = math.log2(math.e), math.log(2)

#: Adding it rounds a number to an integer, which then stands in the lowest bits.
ROUNDER = 1.5 * 2**23

#: 2**f = 1 + f (P0 + f (P1 + ...)) for |f| <= 1/2, minimax: 2e-9 relative.
P0, P1, P2, P3, P4, P5 = (
    0.6931471824645996,
    0.24022647738456726,
    0.055503323674201965,
    0.00961843691766262,
    0.0013398875016719103,
    0.00015353361959569156,
)

#: atanh(r) = r (1 + x (Q0 + x (Q1 + ...))) for x = r**2 <= 1/9, minimax: 5e-9 relative.
Q0, Q1, Q2, Q3 = 0.33333206566280854, 0.2001084953311586, 0.13999570488692764, 0.14012229636438564


@njit(forceinline=True)
def _exp2(x):
    """Two to the power of x, to about one ulp; beyond 2**-125 and 2**127 it stays there. nan stays nan."""
    x = _larger(_all(-125.0), _smaller(_all(127.0), x))
    shifted = x + _all(ROUNDER)
    f = x - (shifted - _all(ROUNDER))
    p = _fma(_all(P5), f, _all(P4))
    p = _fma(p, f, _all(P3))
    p = _fma(p, f, _all(P2))
    p = _fma(p, f, _all(P1))
    p = _fma(p, f, _all(P0))
    return _scale(_fma(p, f, _all(1.0)), shifted)


@njit(forceinline=True)
def _sigmoid(x):
    return _all(1.0) / (_all(1.0) + _exp2(x * _all(-LOG2_E)))


@njit(forceinline=True)
def _softplus(x):
    """log(1 + exp(x)) and its slope."""
    w = _exp2(_smaller(x, _all(0.0) - x) * _all(LOG2_E))
    r = w / (_all(2.0) + w)
    s = r * r
    p = _fma(_all(Q3), s, _all(Q2))
    p = _fma(p, s, _all(Q1))
    p = _fma(p, s, _all(Q0))
    p = _fma(p, s, _all(1.0))
    slope = _where_negative(x, w, _all(1.0)) / (_all(1.0) + w)
    return _larger(_all(0.0), x) + _all(2.0) * r * p, slope


# --- The kernels. Addresses and strides are in bytes; they run the tasks from `first` to before `last`.


@njit(forceinline=True)
def _clear(address, vectors):
    for k in range(vectors):
        _store(address + k * _ROW, _all(0.0))


@njit(forceinline=True)
def _gather_rates(A, rates, e, live, N):
    """A in powers of two, N vectors of the channels from e on, for which A_EN lies the wrong way."""
    _clear(rates, N)
    for lane in range(live):
        for n in range(N):
            a = _load_scalar(A + ((e + lane) * N + n) * _SIZE)
            _store_scalar(rates + n * _ROW + lane * _SIZE, a * types.float32(LOG2_E))


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
        _store(part + k * _ROW, _all(0.0))


def _forward(
    first, last, u, u_b, u_l, dt, dt_b, dt_l, A, B, B_b, B_l, C, C_b, C_l, D, z, z_b, z_l, bias, y,
    starts, keep, scratch, L, E, N, chunk, reverse,
):  # fmt: skip
    vectors = (E + LANES - 1) // LANES
    blocks = (vectors + VECTORS - 1) // VECTORS
    chunks = (L + chunk - 1) // chunk
    rates = scratch
    states = rates + VECTORS * N * _ROW
    for task in range(first, last):
        b = task // blocks
        v_first = task % blocks * VECTORS
        v_last = min(v_first + VECTORS, vectors)
        for v in range(v_first, v_last):
            _gather_rates(A, rates + (v - v_first) * N * _ROW, v * LANES, min(LANES, E - v * LANES), N)
        _clear(states, VECTORS * N)
        for c in range(chunks):
            for v in range(v_first, v_last):
                e = v * _ROW
                live = min(LANES, E - v * LANES)
                rate = rates + (v - v_first) * N * _ROW
                state = states + (v - v_first) * N * _ROW
                start = starts + ((b * vectors + v) * chunks + c) * N * _ROW
                if keep:
                    for n in range(N):
                        _store(start + n * _ROW, _load(state + n * _ROW))
                D_v = _load_part(D + e, live)
                bias_v = _load_part(bias + e, live)
                for i in range(c * chunk, min(c * chunk + chunk, L)):
                    t = L - 1 - i if reverse else i
                    u_v = _load_part(u + b * u_b + t * u_l + e, live)
                    d, _ = _softplus(_load_part(dt + b * dt_b + t * dt_l + e, live) + bias_v)
                    x = d * u_v
                    B_t = B + b * B_b + t * B_l
                    C_t = C + b * C_b + t * C_l
                    sum_v = D_v * u_v
                    for n in range(N):
                        decay = _exp2(d * _load(rate + n * _ROW))
                        h = _fma(decay, _load(state + n * _ROW), x * _all(_load_scalar(B_t + n * _SIZE)))
                        _store(state + n * _ROW, h)
                        sum_v = _fma(h, _all(_load_scalar(C_t + n * _SIZE)), sum_v)
                    z_v = _load_part(z + b * z_b + t * z_l + e, live)
                    _store_part(y + (b * L + t) * E * _SIZE + e, sum_v * z_v * _sigmoid(z_v), live)


def _backward(
    first, last, u, u_b, u_l, dt, dt_b, dt_l, A, B, B_b, B_l, C, C_b, C_l, D, z, z_b, z_l, bias, dy, dy_b, dy_l,
    starts, du, ddt, dz, dB, dC, dparameters, scratch, L, E, N, chunk, reverse,
):  # fmt: skip
    vectors = (E + LANES - 1) // LANES
    blocks = (vectors + VECTORS - 1) // VECTORS
    chunks = (L + chunk - 1) // chunk
    rates = scratch
    carries = rates + VECTORS * N * _ROW
    # The sums over tokens of the gradients of A, D and the bias: of a chunk, and of all with their rounding errors.
    parts = carries + VECTORS * N * _ROW
    totals = parts + (N + 2) * _ROW
    decays = totals + VECTORS * (N + 2) * 2 * _ROW
    states = decays + chunk * N * _ROW
    dBs = states + (chunk + 1) * N * _ROW
    dCs = dBs + chunk * N * _ROW
    tokens = dCs + chunk * N * _ROW
    for task in range(first, last):
        b = task // blocks
        v_first = task % blocks * VECTORS
        v_last = min(v_first + VECTORS, vectors)
        for v in range(v_first, v_last):
            _gather_rates(A, rates + (v - v_first) * N * _ROW, v * LANES, min(LANES, E - v * LANES), N)
        _clear(carries, VECTORS * N)
        _clear(parts, N + 2)
        _clear(totals, VECTORS * (N + 2) * 2)
        for c in range(chunks - 1, -1, -1):
            _clear(dBs, chunk * N)
            _clear(dCs, chunk * N)
            i_first = c * chunk
            size = min(chunk, L - i_first)
            for v in range(v_first, v_last):
                e = v * _ROW
                live = min(LANES, E - v * LANES)
                rate = rates + (v - v_first) * N * _ROW
                carry = carries + (v - v_first) * N * _ROW
                start = starts + ((b * vectors + v) * chunks + c) * N * _ROW
                for n in range(N):
                    _store(states + n * _ROW, _load(start + n * _ROW))
                D_v = _load_part(D + e, live)
                bias_v = _load_part(bias + e, live)
                for i in range(size):
                    t = L - 1 - i_first - i if reverse else i_first + i
                    u_v = _load_part(u + b * u_b + t * u_l + e, live)
                    d, slope = _softplus(_load_part(dt + b * dt_b + t * dt_l + e, live) + bias_v)
                    x = d * u_v
                    B_t = B + b * B_b + t * B_l
                    C_t = C + b * C_b + t * C_l
                    sum_v = D_v * u_v
                    decay_i = decays + i * N * _ROW
                    state_i = states + i * N * _ROW
                    for n in range(N):
                        decay = _exp2(d * _load(rate + n * _ROW))
                        h = _fma(decay, _load(state_i + n * _ROW), x * _all(_load_scalar(B_t + n * _SIZE)))
                        _store(decay_i + n * _ROW, decay)
                        _store(state_i + (N + n) * _ROW, h)
                        sum_v = _fma(h, _all(_load_scalar(C_t + n * _SIZE)), sum_v)
                    z_v = _load_part(z + b * z_b + t * z_l + e, live)
                    dy_v = _load_part(dy + b * dy_b + t * dy_l + e, live)
                    sigmoid = _sigmoid(z_v)
                    silu = z_v * sigmoid
                    silu_slope = _fma(silu, _all(1.0) - sigmoid, sigmoid)
                    _store_part(dz + (b * L + t) * E * _SIZE + e, dy_v * sum_v * silu_slope, live)
                    token = tokens + i * 4 * _ROW
                    _store(token, d)
                    _store(token + _ROW, slope)
                    _store(token + 2 * _ROW, u_v)
                    _store(token + 3 * _ROW, dy_v * silu)
                dD_v = _all(0.0)
                dbias_v = _all(0.0)
                for i in range(size - 1, -1, -1):
                    t = L - 1 - i_first - i if reverse else i_first + i
                    token = tokens + i * 4 * _ROW
                    d = _load(token)
                    u_v = _load(token + 2 * _ROW)
                    dy_v = _load(token + 3 * _ROW)
                    x = d * u_v
                    B_t = B + b * B_b + t * B_l
                    C_t = C + b * C_b + t * C_l
                    decay_i = decays + i * N * _ROW
                    state_i = states + i * N * _ROW
                    dx = _all(0.0)
                    dd = _all(0.0)
                    for n in range(N):
                        g = _fma(dy_v, _all(_load_scalar(C_t + n * _SIZE)), _load(carry + n * _ROW))
                        dB_in = dBs + (i * N + n) * _ROW
                        dC_in = dCs + (i * N + n) * _ROW
                        _store(dB_in, _fma(g, x, _load(dB_in)))
                        _store(dC_in, _fma(_load(state_i + (N + n) * _ROW), dy_v, _load(dC_in)))
                        dx = _fma(g, _all(_load_scalar(B_t + n * _SIZE)), dx)
                        g = g * _load(decay_i + n * _ROW)
                        _store(carry + n * _ROW, g)
                        # Of the exponent d A.
                        dp = g * _load(state_i + n * _ROW)
                        dd = _fma(dp, _load(rate + n * _ROW), dd)
                        _store(parts + n * _ROW, _fma(dp, d, _load(parts + n * _ROW)))
                    dt_v = _fma(dd, _all(LN_2), dx * u_v) * _load(token + _ROW)
                    _store_part(ddt + (b * L + t) * E * _SIZE + e, dt_v, live)
                    _store_part(du + (b * L + t) * E * _SIZE + e, _fma(dx, d, dy_v * D_v), live)
                    dD_v = _fma(dy_v, u_v, dD_v)
                    dbias_v = dbias_v + dt_v
                _store(parts + N * _ROW, dD_v)
                _store(parts + (N + 1) * _ROW, dbias_v)
                _add_compensated(totals + (v - v_first) * (N + 2) * 2 * _ROW, parts, N + 2)
            for i in range(size):
                t = L - 1 - i_first - i if reverse else i_first + i
                for n in range(N):
                    at = ((task * L + t) * N + n) * _SIZE
                    _store_scalar(dB + at, _total(_load(dBs + (i * N + n) * _ROW)))
                    _store_scalar(dC + at, _total(_load(dCs + (i * N + n) * _ROW)))
        for v in range(v_first, v_last):
            for n in range(N + 2):
                total = _load(totals + ((v - v_first) * (N + 2) + n) * 2 * _ROW)
                _store(dparameters + ((b * vectors + v) * (N + 2) + n) * _ROW, total)


def _sum_parameters(dparameters, dA, dD, dbias, batch, E, N):
    """The sums over the batch, from [B, vectors, N + 2, LANES] to [E, N], [E] and [E]."""
    vectors = (E + LANES - 1) // LANES
    for e in range(E):
        for n in range(N + 2):
            total = 0.0
            for b in range(batch):
                row = (b * vectors + e // LANES) * (N + 2) + n
                total += _load_scalar(dparameters + row * _ROW + e % LANES * _SIZE)
            if n < N:
                _store_scalar(dA + (e * N + n) * _SIZE, types.float32(total))
            elif n == N:
                _store_scalar(dD + e * _SIZE, types.float32(total))
            else:
                _store_scalar(dbias + e * _SIZE, types.float32(total))


# --- Compiled once, kept on disk.


class _Announcement(event.Listener):
    """Says once that numba compiles, which a kernel from the disk does not."""

    def __init__(self) -> None:
        self.silent = True

    def on_start(self, event: Any) -> None:
        if self.silent:
            self.silent = False
            logger.warning("compiling the CPU scan, once on this machine, about %d s", COMPILE_S)

    def on_end(self, event: Any) -> None:
        pass


#: What the kernels take to compile.
COMPILE_S = 10

_lock = threading.Lock()


@cache
def _kernels() -> dict[str, Callable]:
    """Each kernel, compiled for addresses and sizes in int64, the only types it is ever called with."""
    with _lock, event.install_listener("numba:compile", _Announcement()):
        return {function.__name__: _compile(function) for function in (_forward, _backward, _sum_parameters)}


def _compile(function: Callable) -> Callable:
    given = types.void(*(types.int64,) * function.__code__.co_argcount)
    try:
        return njit([given], cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:
        # Numba finds no folder to write to.
        return njit([given], nogil=True, error_model="numpy")(function)


# --- Threads.

_pool: ThreadPoolExecutor | None = None


def _forget_threads() -> None:
    """A forked process has none of its parent's threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def _run(kernel: Callable, tasks: int, arguments: Sequence[int], *, scratch: int, at: int) -> None:
    """All tasks, each by whichever thread comes first. `scratch` floats for each thread become the argument `at`."""
    threads = min(torch.get_num_threads(), tasks)

    def call(first: int, last: int, memory: Tensor) -> None:
        kernel(first, last, *arguments[:at], memory.data_ptr(), *arguments[at:])

    if threads == 1:
        call(0, tasks, torch.empty(scratch))
        return
    following = itertools.count()

    def work() -> None:
        memory = torch.empty(scratch)
        while (task := next(following)) < tasks:
            call(task, task + 1, memory)

    others = [_threads(threads - 1).submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()


def _threads(count: int) -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None or _pool._max_workers < count:
            _pool = ThreadPoolExecutor(count, thread_name_prefix="helix-scan")
        return _pool


# --- The operators.


def chunk_of(state: int) -> int:
    """Tokens in a chunk: what the backward recomputes of it stays in the caches next to the core."""
    return 16 if state <= 8 else 32


def _vectors(channels: int) -> int:
    return -(-channels // LANES)


def _blocks(channels: int) -> int:
    return -(-_vectors(channels) // VECTORS)


def _rows(x_BLX: Tensor) -> tuple[Tensor, list[int]]:
    """The tensor, or a copy if its last dimension does not lie side by side; its address and strides in bytes."""
    if x_BLX.stride(-1) != 1:
        x_BLX = x_BLX.contiguous()
    return x_BLX, [x_BLX.data_ptr(), x_BLX.stride(0) * _SIZE, x_BLX.stride(1) * _SIZE]


def _inputs(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor
) -> tuple[list[Tensor], list[int]]:
    """The tensors to hold on to, and what the kernels take of them."""
    (u, u_at), (dt, dt_at), (B, B_at), (C, C_at), (z, z_at) = (_rows(x) for x in (u, dt, B, C, z))
    A, D, dt_bias = A.contiguous(), D.contiguous(), dt_bias.contiguous()
    given = [*u_at, *dt_at, A.data_ptr(), *B_at, *C_at, D.data_ptr(), *z_at, dt_bias.data_ptr()]
    return [u, dt, A, B, C, D, z, dt_bias], given


def _starts_shape(u: Tensor, A: Tensor, *, keep: bool) -> tuple[int, ...]:
    batch, tokens, channels = u.shape
    state = A.shape[1]
    return (batch, _vectors(channels), -(-tokens // chunk_of(state)), state, LANES) if keep else (0,)


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
    (batch, tokens, channels), state = u.shape, A.shape[1]
    held, given = _inputs(u, dt, A, B, C, D, z, dt_bias)
    y = u.new_empty(u.shape)
    starts = u.new_empty(_starts_shape(u, A, keep=keep))
    sizes = [tokens, channels, state, chunk_of(state), reverse]
    _run(
        _kernels()["_forward"],
        batch * _blocks(channels),
        [*given, y.data_ptr(), starts.data_ptr(), keep, *sizes],
        scratch=2 * VECTORS * state * LANES,
        at=-len(sizes),
    )
    del held
    return y, starts


@selective_scan_forward.register_fake
def _(u, dt, A, B, C, D, z, dt_bias, reverse, keep):
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
    held, given = _inputs(u, dt, A, B, C, D, z, dt_bias)
    dy, dy_at = _rows(dy)
    du, ddt, dz = (u.new_empty(u.shape) for _ in range(3))
    dA, dD, dbias = u.new_empty(A.shape), u.new_empty(D.shape), u.new_empty(D.shape)
    dB, dC = (u.new_empty(batch, _blocks(channels), tokens, state) for _ in range(2))
    dparameters = u.new_empty(batch, _vectors(channels), state + 2, LANES)
    results = [x.data_ptr() for x in (starts, du, ddt, dz, dB, dC, dparameters)]
    sizes = [tokens, channels, state, chunk, reverse]
    _run(
        _kernels()["_backward"],
        batch * _blocks(channels),
        [*given, *dy_at, *results, *sizes],
        scratch=LANES * (2 * VECTORS * state + (1 + 2 * VECTORS) * (state + 2) + (4 * chunk + 1) * state + 4 * chunk),
        at=-len(sizes),
    )
    del held
    _kernels()["_sum_parameters"](
        dparameters.data_ptr(), dA.data_ptr(), dD.data_ptr(), dbias.data_ptr(), batch, channels, state
    )
    return du, ddt, dA, _sum_blocks(dB), _sum_blocks(dC), dD, dz, dbias


def _sum_blocks(parts: Tensor) -> Tensor:
    """[B, blocks, L, N] -> [B, L, N], one block after the other."""
    total = parts[:, 0]
    for block in range(1, parts.shape[1]):
        total = total + parts[:, block]
    return total.clone() if parts.shape[1] == 1 else total


@selective_scan_backward.register_fake
def _(dy, starts, u, dt, A, B, C, D, z, dt_bias, reverse):
    return tuple(x.new_empty(x.shape) for x in (u, dt, A, B, C, D, z, dt_bias))


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.reverse, _ = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.set_materialize_grads(False)


def _pull(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    gradients = selective_scan_backward(dy, *ctx.saved_tensors, ctx.reverse)
    wanted = (x if needed else None for x, needed in zip(gradients, ctx.needs_input_grad, strict=False))
    return (*wanted, None, None)


selective_scan_forward.register_autograd(_pull, setup_context=_keep_inputs)


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
    """y_BLE, in float32 only."""
    inputs = (u_BLE, dt_BLE, A_EN, B_BLN, C_BLN, D_E, z_BLE, dt_bias_E)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return selective_scan_forward(*inputs, reverse, keep)[0]
