"""What all threads of a step do together: taking shares of work, meeting at barriers, products of matrices with tiles of tokens.

Groups of rows are taken from a shared counter, so that a thread that the system holds up does not hold up the rest.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ming_app.engine.backends.native.layout import (
    B_GATE,
    B_UP,
    BIAS_GATE,
    BIAS_UP,
    BLOCK,
    CHUNK_GROUPS,
    GATE,
    LANES,
    MANY_GROUPS,
    MATRICES,
    SIDE,
    TILE,
    UP,
    Store,
    Work,
)
from ming_app.engine.backends.native.vector import (
    add_and_get,
    add_float,
    call_ten,
    dot,
    give_way,
    pause,
    quantise,
    read_now,
    read_through,
    silu_times,
)

FLOAT = 4  # bytes
SHARES = 4  # of the groups of a product per thread
SPINS = 4000

jit = njit(nogil=True, cache=True, error_model="numpy")


# -- threads ----------------------------------------------------------------------------------------------------------


@jit
def meet(sync: np.ndarray, phase: int, threads: int) -> int:
    """Waits until all threads are here; the number of the next phase."""
    arrived, rounds = sync.ctypes.data, sync.ctypes.data + 8
    before = read_now(rounds)
    if add_and_get(arrived, 1) == threads:
        add_and_get(arrived, -threads)
        add_and_get(rounds, 1)
        return phase + 1
    spins = 0
    while read_now(rounds) == before:
        pause()
        spins += 1
        if spins > SPINS:  # another program has a core that we need
            give_way()
    return phase + 1


@jit
def take(sync: np.ndarray, phase: int) -> int:
    """The next share of this phase's work: 0, 1, 2, ..."""
    return add_and_get(sync.ctypes.data + 8 * (2 + phase), 1) - 1


@jit
def share_of(groups: int, tokens: int, threads: int) -> int:
    """Groups that a thread takes at a time: long runs of memory for few tokens, what the cache holds for many."""
    return min(max(1, groups // (SHARES * threads)), MANY_GROUPS if tokens <= TILE else CHUNK_GROUPS)


# -- products ---------------------------------------------------------------------------------------------------------


@jit
def width_at(token: int, tokens: int) -> int:
    """Tokens of the tile that starts at `token`: tiles of 8 as long as they last, then 4, 2, 1."""
    left = tokens - token
    if left >= 8:
        return 8
    if left >= 4:
        return 4
    return 2 if left >= 2 else 1


@jit
def tile_start(token: int, tokens: int) -> int:
    """The first token of the tile that holds `token`."""
    start = token // 8 * 8
    while True:
        width = width_at(start, tokens)
        if token < start + width:
            return start
        start += width


@jit
def group_times_tile(
    store: Store,
    matrix: int,
    group: int,
    start: int,
    m: int,
    codes: int,
    side: int,
    base: int,
    base_step: int,
    out: int,
    step: int,
) -> None:
    """Group `group` of a matrix times the tile at token `start`, plus `base`. `codes`, `side`: of all tokens."""
    offset, format_, _, blocks, size = store.matrices[matrix]
    w = store.data.ctypes.data + offset + group * size
    x, beside = codes + start * blocks * BLOCK, side + start * blocks * SIDE
    call_ten(store.multiply, format_, m, w, x, beside, blocks, base, base_step, out, step)


@jit
def quantise_token(x: int, blocks: int, token: int, tokens: int, codes: int, side: int) -> None:
    """float32 [32 blocks] of one token into its place in its tile."""
    start = tile_start(token, tokens)
    m = width_at(start, tokens)
    lane = token - start
    codes += start * blocks * BLOCK + 4 * lane
    side += start * blocks * SIDE + SIDE * lane
    for block in range(blocks):
        quantise(x + block * BLOCK * FLOAT, codes + block * BLOCK * m, 4 * m, side + block * SIDE * m)


@jit
def bias_at(store: Store, row: int, which: int, group: int, work: Work) -> int:
    """Address of a bias for one group, or of zeros where there is none (`which` < 0: nowhere)."""
    offset = store.vectors[row, which] if which >= 0 else -1
    return work.zeros.ctypes.data if offset < 0 else store.data.ctypes.data + offset + group * LANES * FLOAT


@jit
def base_and_ranks(
    store: Store,
    layer: int,
    matrix: int,
    bias: int,
    rank_matrix: int,
    slot: int,
    first: int,
    last: int,
    start: int,
    m: int,
    work: Work,
    out: int,
    out_group: int,
    out_step: int,
    squares: int,
) -> None:
    """out = W x + bias + B (m h) for groups first .. last and one tile, `out_group` bytes from group to group.

    A bias or rank matrix below 0 is none. All of W comes before all of B: memory is fastest in long runs. `squares` >= 0: adds up those of W x + bias, per token.
    """
    codes, side = work.codes.ctypes.data, work.side.ctypes.data
    index = layer * MATRICES + matrix
    for group in range(first, last):
        at = out + (group - first) * out_group
        bias_from = bias_at(store, layer, bias, group, work)
        group_times_tile(store, index, group, start, m, codes, side, bias_from, 0, at, out_step)
        if squares >= 0:
            for t in range(m):
                add_float(squares + (start + t) * 2 * FLOAT, dot(at + t * out_step, at + t * out_step, LANES))
    index = layer * MATRICES + rank_matrix
    if rank_matrix >= 0 and store.matrices[index, 2]:
        codes, side = work.rank_codes[slot].ctypes.data, work.rank_side[slot].ctypes.data
        for group in range(first, last):
            at = out + (group - first) * out_group
            group_times_tile(store, index, group, start, m, codes, side, at, out_step, at, out_step)


@jit
def linear(
    store: Store,
    layer: int,
    matrix: int,
    bias: int,
    rank_matrix: int,
    tokens: int,
    out: np.ndarray,
    residual: bool,
    work: Work,
    thread: int,
    phase: int,
    threads: int,
    measure: bool,
) -> None:
    """out [T, rows] = W x + bias + B (m h), or added to what is there (`residual`), as this thread's share of a phase."""
    groups = store.matrices[layer * MATRICES + matrix, 2]
    share = share_of(groups, tokens, threads)
    step, group_step = out.strides[0], LANES * FLOAT
    scratch = work.scratch[thread]
    own_step = share * group_step
    squares = work.squares[thread].ctypes.data if measure else -1
    while True:
        first = take(work.sync, phase) * share
        if first >= groups:
            return
        last = min(first + share, groups)
        start = 0
        while start < tokens:
            m = width_at(start, tokens)
            at, at_step = out.ctypes.data + start * step + first * group_step, step
            if residual:
                at, at_step = scratch.ctypes.data, own_step
            base_and_ranks(
                store,
                layer,
                matrix,
                bias,
                rank_matrix,
                0,
                first,
                last,
                start,
                m,
                work,
                at,
                group_step,
                at_step,
                squares,
            )
            if residual:
                for t in range(m):
                    for i in range((last - first) * LANES):
                        out[start + t, first * LANES + i] += scratch[t * share * LANES + i]
            start += m


@jit
def gate_times_up(
    store: Store, layer: int, tokens: int, work: Work, thread: int, phase: int, threads: int, measure: bool
) -> None:
    """inner [T, ffn] = silu(gate) up, as this thread's share of a phase."""
    groups = store.matrices[layer * MATRICES + GATE, 2]
    share = share_of(groups, tokens, threads)
    inner, group_step = work.inner, LANES * FLOAT
    own_step = share * group_step
    gate = work.scratch[thread].ctypes.data
    up = gate + TILE * own_step
    squares = work.squares[thread].ctypes.data
    of_gate, of_up = (squares, squares + FLOAT) if measure else (-1, -1)
    while True:
        first = take(work.sync, phase) * share
        if first >= groups:
            return
        last = min(first + share, groups)
        start = 0
        while start < tokens:
            m = width_at(start, tokens)
            base_and_ranks(
                store,
                layer,
                GATE,
                BIAS_GATE,
                B_GATE,
                0,
                first,
                last,
                start,
                m,
                work,
                gate,
                group_step,
                own_step,
                of_gate,
            )
            base_and_ranks(
                store, layer, UP, BIAS_UP, B_UP, 1, first, last, start, m, work, up, group_step, own_step, of_up
            )
            for t in range(m):
                out = inner.ctypes.data + (start + t) * inner.strides[0] + first * group_step
                for i in range(last - first):
                    at = t * own_step + i * group_step
                    silu_times(gate + at, up + at, out + i * group_step)
            start += m


@jit
def read_all(thread: int, threads: int, data: np.ndarray) -> int:
    """Reads a thread's part of uint8 [n]: how fast memory is."""
    part = len(data) // threads // 256 * 256
    return read_through(data.ctypes.data + thread * part, part)
