"""One step of the decoder, run by n threads at once: `step(thread, n, ...)`, which Python enters without its lock.

Phases alternate: some are split by token (norms, quantising, routing, rotation), some by groups of matrix rows (products),
attention by token and KV head; a barrier ends each. What a token gives does not depend on what else is in the step: sums run
in one order.

    h = A x      l = W_s x + bias      S, w = top-k and its softmax      y = W x + B (m h)      m = w spread over the rank rows
"""

from __future__ import annotations

import math

import numpy as np

from ming_app.engine.backends.native.layout import (
    A_DOWN,
    A_IN,
    A_O,
    A_QKV,
    B_DOWN,
    B_K,
    B_O,
    B_Q,
    B_V,
    BIAS_DOWN,
    BIAS_K,
    BIAS_O,
    BIAS_Q,
    BIAS_V,
    BLOCK,
    DOWN,
    GRAM,
    LANES,
    NORM_1,
    NORM_2,
    OUT,
    PAGE,
    ROUTER,
    Call,
    K,
    Q,
    Record,
    Shape,
    Store,
    V,
    Work,
)
from ming_app.engine.backends.native.products import (
    FLOAT,
    gate_times_up,
    jit,
    linear,
    meet,
    quantise_token,
    take,
)
from ming_app.engine.backends.native.tiles import mix
from ming_app.engine.backends.native.vector import (
    dot,
    exponentials,
    largest,
    store_half,
    store_halves,
    sum_of_exponentials,
)

HALF = 2  # bytes
NEVER = np.float32(-3.0e38)

mix_1, mix_2, mix_4, mix_8 = (mix[m] for m in (1, 2, 4, 8))


# -- by token ---------------------------------------------------------------------------------------------------------


@jit
def normalise(x: np.ndarray, shape: Shape, store: Store, gain: int, out: np.ndarray) -> None:
    """RMS norm of float32 [width] times the gain at that offset."""
    at = x.ctypes.data
    mean = dot(at, at, shape.width) / shape.hidden
    scale = np.float32(1.0 / math.sqrt(mean + shape.eps))
    gains = store.data[gain : gain + shape.width * FLOAT].view(np.float32)
    for i in range(shape.width):
        out[i] = x[i] * scale * gains[i]


@jit
def route(
    store: Store, layer: int, projection: int, x: int, blocks: int, token: int, call: Call, record: Record, shape: Shape
) -> None:
    """Chooses and weighs the experts of one cell for one token; into the record. `x`: float32 [32 blocks]."""
    row, cell = call.row[token], 3 * layer + projection
    width = blocks * BLOCK * FLOAT
    router = store.data.ctypes.data + store.vectors[layer, ROUTER + projection]
    logits = record.router_logits[token, cell]
    for expert in range(shape.experts):
        bias = call.bias[row, cell * shape.experts + expert]
        logits[expert] = dot(x, router + expert * width, blocks * BLOCK) + bias
    experts, weights = record.experts[token, cell], record.weights[token, cell]
    for rank in range(len(experts)):  # the largest first, the lower id where alike
        best = -1
        for expert in range(shape.experts):
            taken = False
            for earlier in range(rank):
                taken = taken or experts[earlier] == expert
            if not taken and (best < 0 or logits[expert] > logits[best]):
                best = expert
        experts[rank] = best
    sharp, total = call.sharp[row, cell], np.float32(0)
    for rank in range(len(experts)):
        weight = np.float32(0)
        if rank < call.top_k[row, cell]:
            weight = np.float32(math.exp((logits[experts[rank]] - logits[experts[0]]) * sharp))
        weights[rank] = weight
        total += weight
    for rank in range(len(experts)):
        weights[rank] /= total


@jit
def mask_ranks(
    store: Store,
    layer: int,
    projection: int,
    first: int,
    slot: int,
    token: int,
    tokens: int,
    shape: Shape,
    work: Work,
    call: Call,
    record: Record,
    scratch: np.ndarray,
) -> None:
    """m h of one FFN projection of one token, quantised. Its h starts at rank `first`."""
    cell = 3 * layer + projection
    h = work.ranks[token, first : first + shape.ranks]
    strength = call.strength[call.row[token], cell]
    routed = shape.experts * shape.rank
    for i in range(routed):
        scratch[i] = 0.0
    for i in range(routed, shape.ranks):  # shared experts, then padding
        scratch[i] = h[i] * strength
    experts, weights = record.experts[token, cell], record.weights[token, cell]
    for rank in range(len(experts)):
        at, weight = experts[rank] * shape.rank, weights[rank] * strength
        for i in range(at, at + shape.rank):
            scratch[i] = h[i] * weight
        if call.measure:
            norm = squared_norm(store, layer, projection, experts[rank], h, shape)
            record.deltas[token, cell, rank] = norm * strength * strength
    codes, side = work.rank_codes[slot].ctypes.data, work.rank_side[slot].ctypes.data
    quantise_token(scratch.ctypes.data, shape.ranks // BLOCK, token, tokens, codes, side)


@jit
def squared_norm(store: Store, layer: int, projection: int, expert: int, h: np.ndarray, shape: Shape) -> np.float32:
    """|s B_i h_i|^2 through the expert's Gram matrix."""
    size = shape.rank * shape.rank * FLOAT
    at = store.vectors[layer, GRAM + projection] + expert * size
    gram = store.data[at : at + size].view(np.float32)
    total = np.float32(0)
    for i in range(shape.rank):
        for j in range(shape.rank):
            total += h[expert * shape.rank + i] * gram[i * shape.rank + j] * h[expert * shape.rank + j]
    return total


@jit
def lora_ranks(
    thread: int, threads: int, phase: int, layer: int, matrix: int, ranks: int, store: Store, work: Work, call: Call
) -> int:
    """h = A x of an attention LoRA, at its strength, quantised; the number of the next phase."""
    tokens, scratch = len(call.row), work.scratch[thread]
    linear(store, layer, matrix, -1, -1, tokens, work.ranks, False, work, thread, phase, threads, False)
    phase = meet(work.sync, phase, threads)
    codes, side = work.rank_codes[0].ctypes.data, work.rank_side[0].ctypes.data
    for token in range(thread, tokens, threads):
        strength = call.attention[call.row[token], layer]
        for i in range(ranks):
            scratch[i] = work.ranks[token, i] * strength
        quantise_token(scratch.ctypes.data, ranks // BLOCK, token, tokens, codes, side)
    return meet(work.sync, phase, threads)


# -- attention --------------------------------------------------------------------------------------------------------


@jit
def page_at(call: Call, shape: Shape, page: int, layer: int, head: int, which: int) -> int:
    """Address of the keys (0) or values (1) of one head in one page."""
    size = PAGE * shape.head_dim * HALF
    return call.pool.ctypes.data + (((page * shape.layers + layer) * shape.kv_heads + head) * 2 + which) * size


@jit
def rotate(x: np.ndarray, position: int, store: Store, half: int) -> None:
    """Rotary embedding of one head, in place: halves, not pairs."""
    for i in range(half):
        a, b, cos, sin = x[i], x[i + half], store.cos[position, i], store.sin[position, i]
        x[i] = a * cos - b * sin
        x[i + half] = b * cos + a * sin


@jit
def rotate_and_keep(token: int, layer: int, shape: Shape, store: Store, work: Work, call: Call) -> None:
    """Rotates the queries and keys of one token; its keys and values go into the cache."""
    size, position = shape.head_dim, call.position[token]
    qkv = work.qkv[token]
    scale = np.float32(1.0 / math.sqrt(size))
    for head in range(shape.heads):
        q = qkv[head * size : (head + 1) * size]
        rotate(q, position, store, size // 2)
        for i in range(size):
            q[i] *= scale
    page, lane = call.pages[call.row[token], position // PAGE], position % PAGE
    for head in range(shape.kv_heads):
        k = qkv[(shape.heads + head) * size : (shape.heads + head + 1) * size]
        rotate(k, position, store, size // 2)
        at = page_at(call, shape, page, layer, head, 0)
        for i in range(size):
            store_half(k[i], at + (i * PAGE + lane) * HALF)
        v = qkv.ctypes.data + (shape.heads + shape.kv_heads + head) * size * FLOAT
        at = page_at(call, shape, page, layer, head, 1)
        for i in range(0, size, LANES):
            store_halves(v + i * FLOAT, at + (i * PAGE + lane * LANES) * HALF)


@jit
def add_mix(heads: int, a: int, a_step: int, halves: int, count: int, out: int, out_step: int) -> None:
    """out[h] += a[h] . halves, LANES wide, for any number of heads; see tiles.py."""
    while heads > 0:
        if heads >= 8:
            mix_8(a, a_step, halves, count, out, out_step)
            done = 8
        elif heads >= 4:
            mix_4(a, a_step, halves, count, out, out_step)
            done = 4
        elif heads >= 2:
            mix_2(a, a_step, halves, count, out, out_step)
            done = 2
        else:
            mix_1(a, a_step, halves, count, out, out_step)
            done = 1
        heads -= done
        a += done * a_step
        out += done * out_step


@jit
def attend(token: int, head: int, layer: int, shape: Shape, work: Work, call: Call, scratch: np.ndarray) -> None:
    """What the query heads of one KV head read for one token, into `attended`."""
    size, group = shape.head_dim, shape.heads // shape.kv_heads
    row, count = call.row[token], call.position[token] + 1
    pages = (count + PAGE - 1) // PAGE
    padded = pages * PAGE
    scores = scratch.ctypes.data
    for i in range(group * padded):
        scratch[i] = 0.0
    q = work.qkv.ctypes.data + (token * work.qkv.shape[1] + head * group * size) * FLOAT
    for p in range(pages):
        k = page_at(call, shape, call.pages[row, p], layer, head, 0)
        add_mix(group, q, size * FLOAT, k, size, scores + p * PAGE * FLOAT, padded * FLOAT)
    out = work.attended[token, head * group * size : (head + 1) * group * size]
    out[:] = 0.0
    for h in range(group):
        for i in range(h * padded + count, (h + 1) * padded):
            scratch[i] = NEVER
    for h in range(group):
        own = scores + h * padded * FLOAT
        total = exponentials(own, padded, largest(own, padded))
        share = np.float32(1.0) / total
        for i in range(h * padded, (h + 1) * padded):
            scratch[i] *= share
    for p in range(pages):
        v = page_at(call, shape, call.pages[row, p], layer, head, 1)
        used = min(PAGE, count - p * PAGE)
        for at in range(0, size, LANES):
            own = scores + p * PAGE * FLOAT
            add_mix(group, own, padded * FLOAT, v + at * PAGE * HALF, used, out.ctypes.data + at * FLOAT, size * FLOAT)


# -- the step ---------------------------------------------------------------------------------------------------------


@jit
def attention(
    thread: int, threads: int, phase: int, layer: int, shape: Shape, store: Store, work: Work, call: Call
) -> int:
    """x += attention(norm(x)); the number of the next phase."""
    tokens, scratch = len(call.row), work.scratch[thread]
    codes, side = work.codes.ctypes.data, work.side.ctypes.data
    for token in range(thread, tokens, threads):
        normalise(work.x[token], shape, store, store.vectors[layer, NORM_1], scratch)
        quantise_token(scratch.ctypes.data, shape.width // BLOCK, token, tokens, codes, side)
    phase = meet(work.sync, phase, threads)
    if shape.lora:
        phase = lora_ranks(thread, threads, phase, layer, A_QKV, shape.lora, store, work, call)
    q, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    linear(store, layer, Q, BIAS_Q, B_Q, tokens, work.qkv, False, work, thread, phase, threads, False)
    linear(store, layer, K, BIAS_K, B_K, tokens, work.qkv[:, q:], False, work, thread, phase + 1, threads, False)
    linear(store, layer, V, BIAS_V, B_V, tokens, work.qkv[:, q + k :], False, work, thread, phase + 2, threads, False)
    phase = meet(work.sync, phase + 2, threads)
    for token in range(thread, tokens, threads):
        rotate_and_keep(token, layer, shape, store, work, call)
    phase = meet(work.sync, phase, threads)
    while True:
        item = take(work.sync, phase)
        if item >= tokens * shape.kv_heads:
            break
        attend(item // shape.kv_heads, item % shape.kv_heads, layer, shape, work, call, scratch)
    phase = meet(work.sync, phase, threads)
    for token in range(thread, tokens, threads):
        at = work.attended.ctypes.data + token * work.attended.shape[1] * FLOAT
        quantise_token(at, work.attended.shape[1] // BLOCK, token, tokens, codes, side)
    phase = meet(work.sync, phase, threads)
    if shape.lora_o:
        phase = lora_ranks(thread, threads, phase, layer, A_O, shape.lora_o, store, work, call)
    linear(store, layer, OUT, BIAS_O, B_O, tokens, work.x, True, work, thread, phase, threads, False)
    return meet(work.sync, phase, threads)


@jit
def sum_squares(thread: int, threads: int, layer: int, first: int, count: int, work: Work, record: Record) -> None:
    """The squared norms of W x of `count` projections from all threads' parts; the parts are cleared."""
    for token in range(thread, len(record.bases), threads):
        for i in range(count):
            total = np.float32(0)
            for part in range(threads):
                total += work.squares[part, token, i]
                work.squares[part, token, i] = 0.0
            record.bases[token, 3 * layer + first + i] = total


@jit
def feed_forward(
    thread: int,
    threads: int,
    phase: int,
    layer: int,
    shape: Shape,
    store: Store,
    work: Work,
    call: Call,
    record: Record,
) -> int:
    """x += FFN(norm(x)); the number of the next phase."""
    tokens, scratch = len(call.row), work.scratch[thread]
    codes, side = work.codes.ctypes.data, work.side.ctypes.data
    measure = call.measure and shape.experts > 0
    blocks = shape.width // BLOCK
    for token in range(thread, tokens, threads):
        normalise(work.x[token], shape, store, store.vectors[layer, NORM_2], scratch)
        quantise_token(scratch.ctypes.data, blocks, token, tokens, codes, side)
        if shape.experts:
            for projection in range(2):
                route(store, layer, projection, scratch.ctypes.data, blocks, token, call, record, shape)
    phase = meet(work.sync, phase, threads)
    if shape.experts:
        linear(store, layer, A_IN, -1, -1, tokens, work.ranks, False, work, thread, phase, threads, False)
        phase = meet(work.sync, phase, threads)
        for token in range(thread, tokens, threads):
            for projection in range(2):
                at = projection * shape.ranks
                mask_ranks(store, layer, projection, at, projection, token, tokens, shape, work, call, record, scratch)
        phase = meet(work.sync, phase, threads)
    gate_times_up(store, layer, tokens, work, thread, phase, threads, measure)
    phase = meet(work.sync, phase, threads)
    if measure:
        sum_squares(thread, threads, layer, 0, 2, work, record)
        phase = meet(work.sync, phase, threads)
    blocks = shape.ffn // BLOCK
    for token in range(thread, tokens, threads):
        at = work.inner.ctypes.data + token * work.inner.shape[1] * FLOAT
        quantise_token(at, blocks, token, tokens, codes, side)
        if shape.experts:
            route(store, layer, 2, at, blocks, token, call, record, shape)
    phase = meet(work.sync, phase, threads)
    if shape.experts:
        linear(store, layer, A_DOWN, -1, -1, tokens, work.ranks, False, work, thread, phase, threads, False)
        phase = meet(work.sync, phase, threads)
        for token in range(thread, tokens, threads):
            mask_ranks(store, layer, 2, 0, 0, token, tokens, shape, work, call, record, scratch)
        phase = meet(work.sync, phase, threads)
    linear(store, layer, DOWN, BIAS_DOWN, B_DOWN, tokens, work.x, True, work, thread, phase, threads, measure)
    phase = meet(work.sync, phase, threads)
    if measure:
        sum_squares(thread, threads, layer, 2, 1, work, record)
        phase = meet(work.sync, phase, threads)
    return phase


@jit
def step(thread: int, threads: int, shape: Shape, store: Store, work: Work, call: Call, record: Record) -> int:
    """Reads the T tokens whose embeddings lie in work.x; logits of those wanted and the routing go into the record. Gives the
    number of phases it took, each of which has a counter in work.sync."""
    phase = 0
    for layer in range(shape.layers):
        phase = attention(thread, threads, phase, layer, shape, store, work, call)
        phase = feed_forward(thread, threads, phase, layer, shape, store, work, call, record)
    wanted, scratch = len(call.wanted), work.scratch[thread]
    for i in range(thread, wanted, threads):
        normalise(work.x[call.wanted[i]], shape, store, store.vectors[shape.layers, 0], scratch)
        quantise_token(
            scratch.ctypes.data, shape.width // BLOCK, i, wanted, work.codes.ctypes.data, work.side.ctypes.data
        )
    phase = meet(work.sync, phase, threads)
    if wanted:
        linear(store, shape.layers, 0, 1, -1, wanted, record.logits, False, work, thread, phase, threads, False)
    phase = meet(work.sync, phase, threads)
    for i in range(thread, wanted, threads):
        logits = record.logits[i]
        logits[shape.vocab :] = NEVER
        at, padded = logits.ctypes.data, len(logits)
        top = largest(at, padded)
        record.log_totals[i] = top + np.float32(math.log(sum_of_exponentials(at, padded, top)))
    return meet(work.sync, phase, threads)
