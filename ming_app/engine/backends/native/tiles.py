"""The inner loops: products of stored weights with a tile of tokens, and of float16 pages with float32 rows.

A weight matrix [N, K] is stored in groups of 16 rows, one per lane, and blocks of 32 inputs. In a block the codes of row i
for inputs 4 j .. 4 j + 3 are the bytes of lane i of vector j (0..7). Four ways to store a block (see formats.py, which
writes them; sizes in bytes, h: header of a run of up to 8 blocks):

    k4   h: d, m float16 [16] each, then per block of 8: scale, minimum uint8 [16] each;    block: nibbles 256
    k6   h: d float16 [16], then per block of 8: two scales int8 [16], of 16 inputs each;   block: nibbles 256, pairs of bits 128
    b5   block: d float16 [16], single bits 64, nibbles 256
    b8   block: d float16 [16], bytes 512

    w = d scale q - m minimum (k4)        w = d scale (q - 32) (k6)        w = d (q - 16) (b5)        w = d (q - 128) (b8)

A tile is m tokens (1, 2, 4 or 8), quantised per 32 inputs to signed bytes: codes [K / 4][m][4], beside them per block and
token 16 bytes: scale s, s times the sum of the codes (float32), the sums of either half (int32). Sums of products are
whole numbers; a token's result does not depend on the tile it is in.
"""

from __future__ import annotations

from typing import Any

from numba import cfunc

from ming_app.engine.backends.native.layout import B5, B8, BLOCK, BLOCK_BYTES, HEADER_BYTES, K4, K6, LANES, RUN, SIDE
from ming_app.engine.backends.native.vector import (
    AT,
    F16,
    F32,
    I8,
    I32,
    NONE,
    dot_bytes,
    every,
    fma,
    load,
    loop,
    plus,
    prefetch,
    routine,
    splat,
    store,
    variable,
    vector,
    whole,
)

LINE, AHEAD = 64, 4096  # bytes that the processor is told to fetch before they are needed
WIDTHS = (1, 2, 4, 8)  # of tiles
_LOW, _BIT, _PAIR = 0x0F0F0F0F, 0x01010101, 0x03030303


def _halves(b: Any, address: Any, offset: int = 0) -> Any:
    return b.fpext(load(b, address, vector(F16), offset), vector(F32))


def _scales(b: Any, address: Any, offset: int, *, signed: bool) -> Any:
    codes = load(b, address, vector(I8), offset)
    return b.sitofp((b.sext if signed else b.zext)(codes, vector(I32)), vector(F32))


class _Tile:
    """Writes the product of one group with one tile of m tokens."""

    def __init__(self, b: Any, format_: int, m: int, x: Any, side: Any):
        self.b, self.format, self.m = b, format_, m
        self.x, self.side = x, side
        self.sums = [variable(b, every(F32, 0.0)) for _ in range(m)]

    def block(self, index: Any, header: Any, at: Any, in_run: Any) -> None:
        """One block: `header` of its run, `at` its bytes, `in_run` which of the run."""
        b = self.b
        for line in range(0, BLOCK_BYTES[self.format], LINE):
            prefetch(b, at, line + AHEAD)
        x = b.add(self.x, b.mul(index, whole(BLOCK * self.m)))
        side = b.add(self.side, b.mul(index, whole(SIDE * self.m)))
        if self.format == K4:
            own = b.add(header, b.mul(in_run, whole(32)))
            scale = b.fmul(_halves(b, header), _scales(b, own, 64, signed=False))
            minimum = b.fmul(_halves(b, header, 32), _scales(b, own, 80, signed=False))
            products = self._products(x, self._nibbles(at, 0), [every(I32, 0)] * self.m)
            for t in range(self.m):
                self._add(t, side, products[t], scale)
                less = b.fsub(every(F32, 0.0), splat(b, load(b, side, F32, SIDE * t + 4)))
                b.store(fma(b, minimum, less, b.load(self.sums[t])), self.sums[t])
        elif self.format == K6:
            own = b.add(header, b.mul(in_run, whole(32)))
            d = _halves(b, header)
            codes = self._six_bits(at)
            for half in range(2):
                scale = b.fmul(d, _scales(b, own, 32 + 16 * half, signed=True))
                starts = [self._minus(side, t, 32, (half,)) for t in range(self.m)]
                products = self._products(plus(b, x, 16 * half * self.m), codes[4 * half : 4 * half + 4], starts)
                for t in range(self.m):
                    self._add(t, side, products[t], scale)
        else:
            middle, codes = (16, self._five_bits(at)) if self.format == B5 else (128, self._bytes(at))
            starts = [self._minus(side, t, middle, (0, 1)) for t in range(self.m)]
            products = self._products(x, codes, starts)
            scale = _halves(b, at)
            for t in range(self.m):
                self._add(t, side, products[t], scale)

    def _products(self, x: Any, codes: list[Any], sums: list[Any]) -> list[Any]:
        b, sums = self.b, list(sums)
        for j, code in enumerate(codes):
            for t in range(self.m):
                four = splat(b, load(b, x, I32, 4 * (j * self.m + t)))
                sums[t] = dot_bytes(b, sums[t], code, four, wide=self.format == B8)
        return sums

    def _minus(self, side: Any, t: int, middle: int, halves: tuple[int, ...]) -> Any:
        """-middle times the sum of the token's codes: what unsigned codes are too large by."""
        b = self.b
        sums = [load(b, side, I32, SIDE * t + 8 + 4 * half) for half in halves]
        sum_ = sums[0] if len(sums) == 1 else b.add(*sums)
        return splat(b, b.mul(sum_, I32(-middle)))

    def _add(self, t: int, side: Any, products: Any, scale: Any) -> None:
        b = self.b
        factor = b.fmul(scale, splat(b, load(b, side, F32, SIDE * t)))
        b.store(fma(b, factor, b.sitofp(products, vector(F32)), b.load(self.sums[t])), self.sums[t])

    def _nibbles(self, at: Any, offset: int) -> list[Any]:
        b, codes = self.b, []
        for j in range(4):
            both = load(b, at, vector(I32), offset + 4 * LANES * j)
            codes += [b.and_(both, every(I32, _LOW)), b.and_(b.lshr(both, every(I32, 4)), every(I32, _LOW))]
        return codes

    def _six_bits(self, at: Any) -> list[Any]:
        b, low = self.b, self._nibbles(at, 0)
        high = [load(b, at, vector(I32), 256 + 64 * i) for i in range(2)]
        pairs = [b.and_(b.lshr(high[j // 4], every(I32, 2 * (j % 4))), every(I32, _PAIR)) for j in range(8)]
        return [b.or_(code, b.shl(pair, every(I32, 4))) for code, pair in zip(low, pairs, strict=True)]

    def _five_bits(self, at: Any) -> list[Any]:
        b, low = self.b, self._nibbles(at, 96)
        high = load(b, at, vector(I32), 32)
        bits = [b.and_(b.lshr(high, every(I32, j)), every(I32, _BIT)) for j in range(8)]
        return [b.or_(code, b.shl(bit, every(I32, 4))) for code, bit in zip(low, bits, strict=True)]

    def _bytes(self, at: Any) -> list[Any]:
        return [load(self.b, at, vector(I32), 32 + 4 * LANES * j) for j in range(8)]


def _tile(
    b: Any, format_: int, m: int, w: Any, x: Any, side: Any, blocks: Any, base: Any, base_step: Any, out: Any, step: Any
) -> None:
    """out[t] = W x[t] + base[t] of one group and one tile of m tokens, LANES float32 at steps in bytes."""
    made = _Tile(b, format_, m, x, side)
    header_bytes, block_bytes = HEADER_BYTES[format_], BLOCK_BYTES[format_]
    if not header_bytes:
        with loop(b, blocks) as index:
            made.block(index, w, b.add(w, b.mul(index, whole(block_bytes))), whole(0))
    else:
        run_bytes = header_bytes + RUN * block_bytes
        with loop(b, b.udiv(b.add(blocks, whole(RUN - 1)), whole(RUN))) as run:
            header = b.add(w, b.mul(run, whole(run_bytes)))
            first = b.mul(run, whole(RUN))
            left = b.sub(blocks, first)
            count = b.select(b.icmp_signed("<", left, whole(RUN)), left, whole(RUN))
            with loop(b, count) as i:
                at = b.add(plus(b, header, header_bytes), b.mul(i, whole(block_bytes)))
                made.block(b.add(first, i), header, at, i)
    for t in range(m):
        added = load(b, b.add(base, b.mul(base_step, whole(t))), vector(F32))
        store(b, b.fadd(b.load(made.sums[t]), added), b.add(out, b.mul(step, whole(t))))


def _any_tile(b: Any, format_: Any, m: Any, *rest: Any) -> None:
    """The tile of that format and width."""
    for kind in (K4, K6, B5, B8):
        with b.if_then(b.icmp_signed("==", format_, whole(kind))):
            for width in WIDTHS:
                with b.if_then(b.icmp_signed("==", m, whole(width))):
                    _tile(b, kind, width, *rest)


def _mix(m: int) -> Any:
    """(a, a_step, halves, count, out, out_step): out[h] += sum over i of a[h][i] halves[i], LANES wide, for m rows h."""

    def mix(b: Any, a: Any, a_step: Any, halves: Any, count: Any, out: Any, out_step: Any) -> None:
        outs = [b.add(out, b.mul(out_step, whole(h))) for h in range(m)]
        sums = [variable(b, load(b, one, vector(F32))) for one in outs]
        with loop(b, count) as i:
            value = _halves(b, b.add(halves, b.mul(i, whole(2 * LANES))))
            at = b.add(a, b.mul(i, whole(4)))
            for h, sum_ in enumerate(sums):
                factor = splat(b, load(b, b.add(at, b.mul(a_step, whole(h))), F32))
                b.store(fma(b, factor, value, b.load(sum_)), sum_)
        for one, sum_ in zip(outs, sums, strict=True):
            store(b, b.load(sum_), one)

    return routine([AT] * 6, NONE, mix)


any_tile = routine([AT] * 10, NONE, _any_tile)
mix = {m: _mix(m) for m in WIDTHS}


@cfunc(NONE(*[AT] * 10), cache=True)
def multiply(
    format_: int, m: int, w: int, x: int, side: int, blocks: int, base: int, base_step: int, out: int, step: int
) -> None:
    """One group times one tile of m tokens: out[t] = W x[t] + base[t], steps in bytes. Compiled once and called by address: as
    part of its callers it would be compiled again with each of them."""
    any_tile(format_, m, w, x, side, blocks, base, base_step, out, step)
