"""Tiny GGUF files written by the gguf package: a real Qwen2 tokenizer in small, and every tensor of a 2-layer model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, VOCAB = 256, 512, 2, 4, 2, 320
HEAD_DIM = HIDDEN // HEADS
ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "ä ½", "ä½ ł", "å ¥", "å¥ ½", "e Ģ", "0 0"]

Q4_K_BYTES, Q6_K_BYTES = 144, 210  # bytes of a block of 256 weights


def k_blocks(kind: GGMLQuantizationType, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Random Q4_K or Q6_K blocks with sane scales (the gguf package cannot quantise to these types)."""
    width = Q4_K_BYTES if kind == GGMLQuantizationType.Q4_K else Q6_K_BYTES
    blocks = rng.integers(0, 256, (shape[0], shape[1] // 256, width), np.uint8)
    scale = rng.uniform(1e-4, 1e-3, (shape[0], shape[1] // 256, 1)).astype(np.float16).view(np.uint8)
    if kind == GGMLQuantizationType.Q4_K:
        blocks[..., 0:2], blocks[..., 2:4] = scale, scale[..., ::-1] & 0x13  # d, and a small positive dmin
    else:
        blocks[..., -2:] = scale
    return blocks.reshape(shape[0], -1)


def tensors(family: str, rng: np.random.Generator, tied: bool) -> dict[str, tuple[np.ndarray, GGMLQuantizationType]]:
    """GGUF name -> (data as the file holds it, type), a different type for nearly every kind of linear."""
    types = GGMLQuantizationType
    narrow = KV_HEADS * HEAD_DIM
    linears = {
        "attn_q": ((HIDDEN, HIDDEN), types.Q5_0),
        "attn_k": ((narrow, HIDDEN), types.Q8_0),
        "attn_v": ((narrow, HIDDEN), types.F16),
        "attn_output": ((HIDDEN, HIDDEN), types.F32),
        "ffn_gate": ((FFN, HIDDEN), types.Q4_K),
        "ffn_up": ((FFN, HIDDEN), types.Q4_0),
        "ffn_down": ((HIDDEN, FFN), types.Q6_K),
    }
    out: dict[str, tuple[np.ndarray, GGMLQuantizationType]] = {}

    def add(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
        if kind in (types.Q4_K, types.Q6_K):
            out[name] = k_blocks(kind, shape, rng), kind  # type: ignore[arg-type]
        else:
            out[name] = quantize(rng.normal(0, 0.05, shape).astype(np.float32), kind), kind

    add("token_embd.weight", (VOCAB, HIDDEN), types.Q8_0)
    if not tied:
        add("output.weight", (VOCAB, HIDDEN), types.Q6_K)
    add("output_norm.weight", (HIDDEN,), types.F32)
    for layer in range(LAYERS):
        for name, (shape, kind) in linears.items():
            add(f"blk.{layer}.{name}.weight", shape, kind)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}.weight", (HIDDEN,), types.F32)
        if family == "qwen2":
            for name, size in (("attn_q", HIDDEN), ("attn_k", narrow), ("attn_v", narrow)):
                add(f"blk.{layer}.{name}.bias", (size,), types.F32)
    return out


def vocabulary() -> tuple[list[str], list[int]]:
    """(tokens, types): 256 bytes, the merges, padding-free added tokens, then unused padding rows, as in Qwen2 files."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    types = [TokenType.NORMAL] * len(tokens)
    tokens += ADDED
    types += [TokenType.CONTROL] * 3 + [TokenType.USER_DEFINED]
    while len(tokens) < VOCAB:
        tokens.append(f"[PAD{len(tokens)}]")
        types.append(TokenType.UNUSED)
    return tokens, [int(kind) for kind in types]


def write_gguf(path: Path, family: str = "qwen2", *, seed: int = 0, tied: bool = False, change=None) -> Path:  # noqa: ANN001
    """Write a sound file; `change(writer, tensors)` may spoil it before it is written."""
    writer = GGUFWriter(path, family)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    tokens, types = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")
    data = tensors(family, np.random.default_rng(seed), tied)
    if change:
        change(writer, data)
    for name, (values, kind) in data.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
