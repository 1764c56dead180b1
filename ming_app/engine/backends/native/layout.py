"""Names and sizes shared by those who write the weights and those who read them. What formats mean: tiles.py."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ming_app.engine.paging import PAGE as PAGE  # tokens per page of the KV cache

LANES = 16
K4, K6, B5, B8 = range(4)
BLOCK, RUN, TILE = 32, 8, 8
HEADER_BYTES = {K4: 64 + 32 * RUN, K6: 32 + 32 * RUN, B5: 0, B8: 0}
BLOCK_BYTES = {K4: 256, K6: 256 + 128, B5: 32 + 64 + 256, B8: 32 + 512}
SIDE = 16
"""bytes beside a token's codes, per block"""


def group_bytes(format_: int, blocks: int) -> int:
    """Size of one group of 16 rows with that many blocks."""
    return -(-blocks // RUN) * HEADER_BYTES[format_] + blocks * BLOCK_BYTES[format_]


Q, K, V, OUT, GATE, UP, DOWN, A_QKV, B_Q, B_K, B_V, A_O, B_O, A_IN, B_GATE, B_UP, A_DOWN, B_DOWN = range(18)
"""matrices of a layer, in the table of matrices; the head comes after those of all layers. A and B: of the adapter (LoRA of
attention, experts of the FFN); A_QKV serves q, k and v, A_IN is that of gate and then that of up"""
MATRICES = 18
NORM_1, NORM_2, BIAS_Q, BIAS_K, BIAS_V, BIAS_O, BIAS_GATE, BIAS_UP, BIAS_DOWN = range(9)
ROUTER, GRAM = 9, 12  # of gate, up and down
"""float32 data of a layer, in the table of vectors; then those of the end: the last norm's gain, the head's bias"""
VECTORS = 15
"""float32 data of a layer, in the table of vectors; then those of the end: the last norm's gain, the head's bias"""
MANY_GROUPS, CHUNK_GROUPS = 128, 8
"""groups that a thread takes at a time, at most: with one tile of tokens, and with more, which pass while these stay cached"""


class Shape(NamedTuple):
    """Sizes that the kernels need; widths are padded to whole blocks."""

    layers: int
    hidden: int
    """true size, for the mean of the norm"""
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int
    """0: no adapter"""
    rank: int
    """rank rows of one expert"""
    ranks: int
    """rank rows of one projection, shared ones too, padded"""
    lora: int
    """rank rows of the attention LoRA of q, k and v together, padded; 0: none"""
    lora_o: int
    eps: float


class Store(NamedTuple):
    """The weights: one memory map and where things lie in it."""

    data: np.ndarray
    """uint8 [bytes]"""
    matrices: np.ndarray
    """int64 [18 L + 2, 5]: offset, format, groups of 16 rows (0: absent), blocks of 32 inputs, bytes of a group"""
    vectors: np.ndarray
    """int64 [L + 1, 15]: offsets, -1: absent; row L: gain and bias of the end"""
    cos: np.ndarray
    """float32 [positions, D / 2]"""
    sin: np.ndarray
    multiply: int
    """address of `tiles.multiply`"""


class Work(NamedTuple):
    """Memory of a step of up to T tokens on n threads; contents live for one step."""

    x: np.ndarray
    """float32 [T, width]: the residual stream; embeddings at the start"""
    qkv: np.ndarray
    """float32 [T, (heads + 2 kv heads) D]"""
    attended: np.ndarray
    """float32 [T, heads D, padded]"""
    inner: np.ndarray
    """float32 [T, ffn]"""
    ranks: np.ndarray
    """float32 [T, n]: what the A matrices gave"""
    codes: np.ndarray
    """uint8: the quantised input of a product"""
    side: np.ndarray
    rank_codes: np.ndarray
    """uint8 [2, n]: the same for the rank rows of gate and up"""
    rank_side: np.ndarray
    scratch: np.ndarray
    """float32 [threads, n]"""
    zeros: np.ndarray
    """float32 [16]"""
    squares: np.ndarray
    """float32 [threads, T, 2]: partial sums of squares of the base's outputs, where measured"""
    sync: np.ndarray
    """int64: threads that have arrived, rounds they have met, then one counter per phase"""


class Call(NamedTuple):
    """One step: T tokens of B rows."""

    row: np.ndarray
    """int64 [T]"""
    position: np.ndarray
    """int64 [T]"""
    pages: np.ndarray
    """int64 [B, n]: pages of every row, in order"""
    pool: np.ndarray
    """uint16 [pages, L, kv heads, 2, 16 D]: float16 bits; K as [D][16 tokens], V as [D / 16][16 tokens][16]"""
    wanted: np.ndarray
    """int64 [n]: tokens whose logits are asked for"""
    bias: np.ndarray
    """float32 [B, 3 L E]: added to the router logits"""
    top_k: np.ndarray
    """uint8 [B, 3 L]"""
    sharp: np.ndarray
    """float32 [B, 3 L]: 1, or 0 where the chosen weigh alike"""
    strength: np.ndarray
    """float32 [B, 3 L]"""
    attention: np.ndarray
    """float32 [B, L]: strength of the attention LoRA"""
    measure: bool


class Record(NamedTuple):
    """What a step leaves."""

    logits: np.ndarray
    """float32 [n, V padded]; what fills the rows up is far below any logit"""
    log_totals: np.ndarray
    """float32 [n]: log of the sum of their exponentials"""
    experts: np.ndarray
    """uint8 [T, 3 L, k]"""
    weights: np.ndarray
    """float32 [T, 3 L, k]"""
    router_logits: np.ndarray
    """float32 [T, 3 L, E] where measured"""
    deltas: np.ndarray
    """float32 [T, 3 L, k] where measured: squared norm of s B_i A_i x at the strength asked for"""
    bases: np.ndarray
    """float32 [T, 3 L] where measured: squared norm of W x"""
