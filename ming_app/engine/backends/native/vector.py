"""Vectors for numba: functions on plain addresses that compile to the processor's own wide instructions.

Numba has no vector type. Here the few loops that must be vectors are written out in LLVM's language, whose vectors of 16
lanes become whatever the processor has (512, 256 or 128 bits); only the product of bytes needs a choice by hand
(`dot_bytes`), and every variant of it gives the same whole numbers. Addresses are int64; nothing is checked: the caller
owns the memory. Lengths n are multiples of LANES.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, config, types
from numba.extending import intrinsic

from ming_app.engine.backends.native import keep_kernels_in
from ming_app.engine.backends.native.layout import LANES

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, VOID = ir.HalfType(), ir.FloatType(), ir.VoidType()
keep_kernels_in()  # before anything is compiled

LN2, LOG2E = 0.6931471805599453, 1.4426950408889634
EXP_TERMS = (
    1.0,
    1.0,
    0.5,
    0.16666667,
    0.041666668,
    0.008333334,
    0.0013888889,
    0.00019841270,
)  # Taylor, |x| <= ln 2 / 2


def _features() -> dict[str, bool]:
    """What the processor that numba compiles for can do."""
    name, asked = (getattr(config, key, None) for key in ("CPU_NAME", "CPU_FEATURES"))
    if name is not None or asked is not None:  # another than this one was asked for
        return {one[1:]: True for one in (asked or "").split(",") if one.startswith("+")}
    return dict(binding.get_host_cpu_features())


def _kind() -> str:
    """How the processor multiplies bytes."""
    features = _features()
    for kind, needed in (
        ("vnni512", ("avx512vnni", "avx512bw")),
        ("vnni256", ("avxvnni", "avx2")),
        ("madd512", ("avx512bw",)),
        ("madd256", ("avx2",)),
    ):
        if all(features.get(name) for name in needed):
            return kind
    return "plain"


DOT_KIND = _kind()
X86 = platform.machine().lower() in ("x86_64", "amd64")
SUPPORTED = not X86 or bool(_features().get("f16c"))
"""Whether the kernels can run: an x86 processor must convert float16 by itself (all since 2013 do)"""


# -- writing instructions ---------------------------------------------------------------------------------------------


def vector(element: ir.Type, count: int = LANES) -> ir.VectorType:
    """A vector type."""
    return ir.VectorType(element, count)


def whole(value: int) -> ir.Constant:
    """An int64 constant."""
    return ir.Constant(I64, value)


def every(element: ir.Type, value: float, count: int = LANES) -> ir.Constant:
    """A vector constant with the same number in every lane."""
    return ir.Constant(vector(element, count), [ir.Constant(element, value)] * count)


def plus(b: Any, address: Any, offset: Any) -> Any:
    """address + offset, an int or a value."""
    if isinstance(offset, int):
        return address if offset == 0 else b.add(address, whole(offset))
    return b.add(address, offset)


def load(b: Any, address: Any, type_: ir.Type, offset: int = 0) -> Any:
    """Reads a value from an address of any alignment."""
    return b.load(b.inttoptr(plus(b, address, offset), type_.as_pointer()), align=1)


def store(b: Any, value: Any, address: Any, offset: int = 0) -> None:
    """Writes a value to an address of any alignment."""
    b.store(value, b.inttoptr(plus(b, address, offset), value.type.as_pointer()), align=1)


def prefetch(b: Any, address: Any, offset: int) -> None:
    """Asks for a line of memory ahead of its use, into the second cache."""
    line = b.inttoptr(plus(b, address, offset), I8.as_pointer())
    call(b, "llvm.prefetch.p0", VOID, line, I32(0), I32(2), I32(1))


def splat(b: Any, scalar: Any, count: int = LANES) -> Any:
    """The scalar in every lane."""
    type_ = vector(scalar.type, count)
    first = b.insert_element(ir.Constant(type_, ir.Undefined), scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(first, ir.Constant(type_, ir.Undefined), ir.Constant(vector(I32, count), [0] * count))


def call(b: Any, name: str, result: ir.Type, *args: Any) -> Any:
    """Calls a function by name: an LLVM intrinsic, or one of the C library."""
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(result, [a.type for a in args]), name)
    return b.call(function, args)


def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x y + z, rounded once."""
    return call(b, f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)


def part(b: Any, value: Any, start: int, count: int) -> Any:
    """Lanes start .. start + count."""
    lanes = ir.Constant(vector(I32, count), list(range(start, start + count)))
    return b.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), lanes)


def joined(b: Any, low: Any, high: Any) -> Any:
    """Two vectors end to end."""
    count = 2 * low.type.count
    return b.shuffle_vector(low, high, ir.Constant(vector(I32, count), list(range(count))))


def total(b: Any, value: Any) -> Any:
    """Sum of the lanes, pairwise."""
    while value.type.count > 1:
        half = value.type.count // 2
        value = b.fadd(part(b, value, 0, half), part(b, value, half, half))
    return b.extract_element(value, ir.Constant(I32, 0))


def variable(b: Any, value: Any) -> Any:
    """A mutable local that starts with `value`; LLVM keeps it in a register."""
    with b.goto_entry_block():
        slot = b.alloca(value.type)
    b.store(value, slot)
    return slot


@contextmanager
def loop(b: Any, count: Any) -> Any:
    """for i in range(count): gives i."""
    with cgutils.for_range(b, count) as each:
        yield each.index


def exp(b: Any, x: Any) -> Any:
    """e^x of float32 lanes, relative error under 3e-7; 0 below -87."""
    type_ = x.type
    count = type_.count
    low = b.fcmp_ordered("<", x, every(F32, -87.0, count))
    x = b.select(b.fcmp_ordered(">", x, every(F32, 88.0, count)), every(F32, 88.0, count), x)
    x = b.select(low, every(F32, -87.0, count), x)
    n = call(b, f"llvm.rint.v{count}f32", type_, b.fmul(x, every(F32, LOG2E, count)))
    rest = fma(b, n, every(F32, -LN2, count), x)
    power = every(F32, EXP_TERMS[-1], count)
    for term in EXP_TERMS[-2::-1]:
        power = fma(b, power, rest, every(F32, term, count))
    exponent = b.shl(b.add(b.fptosi(n, vector(I32, count)), every(I32, 127, count)), every(I32, 23, count))
    return b.select(low, every(F32, 0.0, count), b.fmul(power, b.bitcast(exponent, type_)))


def dot_bytes(b: Any, sums: Any, codes: Any, x: Any, *, wide: bool) -> Any:
    """sums[i] + codes[i] . x[i] over the 4 bytes of each 32-bit lane; codes unsigned (`wide`: above 127 too), x signed."""
    if DOT_KIND == "vnni512":
        return call(b, "llvm.x86.avx512.vpdpbusd.512", sums.type, sums, codes, x)
    if DOT_KIND in ("vnni256", "madd256"):
        parts = [[part(b, value, at, 8) for value in (sums, codes, x)] for at in (0, 8)]
        return joined(b, *(_dot_256(b, one[0], one[1], one[2], wide) for one in parts))
    if DOT_KIND == "madd512":
        return _dot_madd(b, sums, codes, x, wide, "llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512")
    bytes_ = vector(I8, 4 * sums.type.count)
    products = b.mul(
        b.zext(b.bitcast(codes, bytes_), vector(I32, bytes_.count)),
        b.sext(b.bitcast(x, bytes_), vector(I32, bytes_.count)),
    )
    for at in range(4):
        lanes = ir.Constant(vector(I32, sums.type.count), list(range(at, bytes_.count, 4)))
        sums = b.add(sums, b.shuffle_vector(products, ir.Constant(products.type, ir.Undefined), lanes))
    return sums


def _dot_256(b: Any, sums: Any, codes: Any, x: Any, wide: bool) -> Any:
    if DOT_KIND == "vnni256":
        return call(b, "llvm.x86.avx512.vpdpbusd.256", sums.type, sums, codes, x)
    return _dot_madd(b, sums, codes, x, wide, "llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd")


def _dot_madd(b: Any, sums: Any, codes: Any, x: Any, wide: bool, pairs: str, fours: str) -> Any:
    """Products of bytes are added in pairs of 16 bits, which codes above 127 could overflow: they go as 2 (c >> 1) + (c & 1)."""
    count = sums.type.count
    shorts, ones = vector(I16, 2 * count), every(I16, 1, 2 * count)
    bytes_ = vector(I8, 4 * count)

    def product(of: Any) -> Any:
        both = call(b, pairs, shorts, b.bitcast(of, bytes_), b.bitcast(x, bytes_))
        return call(b, fours, sums.type, both, ones)

    if not wide:
        return b.add(sums, product(codes))
    halves = product(b.and_(b.lshr(codes, every(I32, 1, count)), every(I32, 0x7F7F7F7F, count)))
    odd = product(b.and_(codes, every(I32, 0x01010101, count)))
    return b.add(sums, b.add(b.add(halves, halves), odd))


# -- functions for numba code -----------------------------------------------------------------------------------------


def routine(arguments: Sequence[types.Type], result: types.Type, emit: Callable[..., Any]) -> Any:
    """A numba function of the given argument types; `emit(builder, *values)` writes it and returns its value (None: void)."""
    signature = result(*arguments)
    names = [f"a{i}" for i in range(len(arguments))]

    def codegen(context: Any, builder: Any, _signature: Any, values: Sequence[Any]) -> Any:
        value = emit(builder, *values)
        return context.get_dummy_value() if value is None else value

    scope: dict[str, Any] = {"signature": signature, "codegen": codegen}
    exec(
        f"def made(typingctx, {', '.join(names)}):\n    return signature, codegen", scope
    )  # numba reads the parameters
    made = scope["made"]
    made.__name__ = made.__qualname__ = emit.__name__.strip("_")
    return intrinsic(made)


AT, FLOAT, NONE = types.int64, types.float32, types.void


def _dot(b: Any, x: Any, y: Any, n: Any) -> Any:
    """Four sums at a time: the order is fixed, so that the result is the same on every run."""
    parts = [variable(b, every(F32, 0.0)) for _ in range(4)]
    rounds = b.udiv(n, whole(4 * LANES))
    with loop(b, rounds) as i:
        at = b.mul(i, whole(16 * LANES))
        for j, one in enumerate(parts):
            left, right = (load(b, b.add(base, at), vector(F32), 4 * LANES * j) for base in (x, y))
            b.store(fma(b, left, right, b.load(one)), one)
    done = b.mul(rounds, whole(4))
    with loop(b, b.sub(b.udiv(n, whole(LANES)), done)) as i:
        at = b.mul(b.add(i, done), whole(4 * LANES))
        left, right = (load(b, b.add(base, at), vector(F32)) for base in (x, y))
        b.store(fma(b, left, right, b.load(parts[0])), parts[0])
    a, c, d, e = (b.load(one) for one in parts)
    return total(b, b.fadd(b.fadd(a, c), b.fadd(d, e)))


def _largest(b: Any, x: Any, n: Any) -> Any:
    best = variable(b, every(F32, -3.0e38))
    with loop(b, b.udiv(n, whole(LANES))) as i:
        value, held = load(b, b.add(x, b.mul(i, whole(4 * LANES))), vector(F32)), b.load(best)
        b.store(b.select(b.fcmp_ordered(">", value, held), value, held), best)
    value = b.load(best)
    while value.type.count > 1:
        half = value.type.count // 2
        low, high = part(b, value, 0, half), part(b, value, half, half)
        value = b.select(b.fcmp_ordered(">", low, high), low, high)
    return b.extract_element(value, ir.Constant(I32, 0))


def _exponentials(b: Any, x: Any, n: Any, less: Any) -> Any:
    sum_ = variable(b, every(F32, 0.0))
    with loop(b, b.udiv(n, whole(LANES))) as i:
        at = b.add(x, b.mul(i, whole(4 * LANES)))
        value = exp(b, b.fsub(load(b, at, vector(F32)), splat(b, less)))
        store(b, value, at)
        b.store(b.fadd(b.load(sum_), value), sum_)
    return total(b, b.load(sum_))


def _sum_of_exponentials(b: Any, x: Any, n: Any, less: Any) -> Any:
    sums = [variable(b, every(F32, 0.0)) for _ in range(2)]
    with loop(b, b.udiv(n, whole(2 * LANES))) as i:
        at = b.add(x, b.mul(i, whole(8 * LANES)))
        for j, one in enumerate(sums):
            value = exp(b, b.fsub(load(b, at, vector(F32), 4 * LANES * j), splat(b, less)))
            b.store(b.fadd(b.load(one), value), one)
    return total(b, b.fadd(b.load(sums[0]), b.load(sums[1])))


def _silu_times(b: Any, gate: Any, up: Any, out: Any) -> None:
    x = load(b, gate, vector(F32))
    share = b.fdiv(every(F32, 1.0), b.fadd(every(F32, 1.0), exp(b, b.fsub(every(F32, 0.0), x))))
    store(b, b.fmul(b.fmul(x, share), load(b, up, vector(F32))), out)


def _quantise(b: Any, x: Any, codes: Any, step: Any, side: Any) -> None:
    """32 floats at x -> bytes at `codes`, 4 at a time, each `step` bytes on; at `side`: scale, scale times sum, two sums."""
    halves = [load(b, x, vector(F32), 64 * i) for i in range(2)]
    sizes = [call(b, "llvm.fabs.v16f32", vector(F32), half) for half in halves]
    top = b.select(b.fcmp_ordered(">", *sizes), *sizes)
    while top.type.count > 1:
        half_ = top.type.count // 2
        low, high = part(b, top, 0, half_), part(b, top, half_, half_)
        top = b.select(b.fcmp_ordered(">", low, high), low, high)
    largest = b.extract_element(top, ir.Constant(I32, 0))
    scale = b.fdiv(largest, ir.Constant(F32, 127.0))
    inverse = b.select(
        b.fcmp_ordered(">", largest, ir.Constant(F32, 1e-30)),
        b.fdiv(ir.Constant(F32, 127.0), largest),
        ir.Constant(F32, 0.0),
    )
    sums = []
    for i, half in enumerate(halves):
        rounded = call(b, "llvm.rint.v16f32", vector(F32), b.fmul(half, splat(b, inverse)))
        numbers = b.fptosi(rounded, vector(I32))
        fours = b.bitcast(b.trunc(numbers, vector(I8)), vector(I32, 4))
        for j in range(4):
            at = b.add(codes, b.mul(step, whole(4 * i + j)))
            store(b, b.extract_element(fours, ir.Constant(I32, j)), at)
        sums.append(call(b, "llvm.vector.reduce.add.v16i32", I32, numbers))
    store(b, scale, side)
    store(b, b.fmul(scale, b.sitofp(b.add(*sums), F32)), side, 4)
    for i, sum_ in enumerate(sums):
        store(b, sum_, side, 8 + 4 * i)


def _read_through(b: Any, x: Any, n: Any) -> Any:
    parts = [variable(b, every(I32, 0)) for _ in range(4)]
    with loop(b, b.udiv(n, whole(16 * LANES))) as i:
        at = b.add(x, b.mul(i, whole(16 * LANES)))
        for j, one in enumerate(parts):
            b.store(b.xor(b.load(one), load(b, at, vector(I32), 4 * LANES * j)), one)
    a, c, d, e = (b.load(one) for one in parts)
    return b.sext(call(b, "llvm.vector.reduce.xor.v16i32", I32, b.xor(b.xor(a, c), b.xor(d, e))), I64)


def _store_half(b: Any, value: Any, address: Any) -> None:
    store(b, b.fptrunc(value, F16), address)


def _store_halves(b: Any, x: Any, address: Any) -> None:
    store(b, b.fptrunc(load(b, x, vector(F32)), vector(F16)), address)


def _add_and_get(b: Any, address: Any, amount: Any) -> Any:
    old = b.atomic_rmw("add", b.inttoptr(address, I64.as_pointer()), amount, "seq_cst")
    return b.add(old, amount)


def _read_now(b: Any, address: Any) -> Any:
    return b.load_atomic(b.inttoptr(address, I64.as_pointer()), "acquire", 8)


def _add_float(b: Any, address: Any, amount: Any) -> None:
    store(b, b.fadd(load(b, address, F32), amount), address)


def _give_way(b: Any) -> None:
    if sys.platform != "win32":
        call(b, "sched_yield", I32)


def _call_ten(b: Any, address: Any, *values: Any) -> None:
    b.call(b.inttoptr(address, ir.FunctionType(VOID, [I64] * 10).as_pointer()), values)


def _pause(b: Any) -> None:
    if X86:
        call(b, "llvm.x86.sse2.pause", VOID)


dot = routine([AT, AT, AT], FLOAT, _dot)
"""(x, y, n): sum of the products of float32 [n]"""
largest = routine([AT, AT], FLOAT, _largest)
"""(x, n): the largest of float32 [n]"""
exponentials = routine([AT, AT, FLOAT], FLOAT, _exponentials)
"""(x, n, m): float32 x [n] becomes e^(x - m); their sum"""
sum_of_exponentials = routine([AT, AT, FLOAT], FLOAT, _sum_of_exponentials)
"""(x, n, m): sum of e^(x - m) of float32 [n]; n is a multiple of 2 LANES"""
silu_times = routine([AT, AT, AT], NONE, _silu_times)
"""(g, u, out): LANES float32 of g sigmoid(g) u"""
quantise = routine([AT, AT, AT, AT], NONE, _quantise)
"""(x, codes, step, side): see `_quantise`"""
read_through = routine([AT, AT], AT, _read_through)
"""(x, n): all of n bytes, as fast as memory gives them; n is a multiple of 16 LANES"""
store_half = routine([FLOAT, AT], NONE, _store_half)
"""(value, address): as float16"""
store_halves = routine([AT, AT], NONE, _store_halves)
"""(x, address): LANES float32 as float16"""
add_and_get = routine([AT, AT], AT, _add_and_get)
"""(address, amount): atomically; the new value"""
read_now = routine([AT], AT, _read_now)
"""(address): what another thread wrote"""
add_float = routine([AT, FLOAT], NONE, _add_float)
"""(address, amount): not atomically"""
give_way = routine([], NONE, _give_way)
"""Lets the system run another thread on this core"""
call_ten = routine([AT] * 11, NONE, _call_ten)
"""(address, ten numbers): calls a C function"""
pause = routine([], NONE, _pause)
"""Tells the processor that this thread waits"""
