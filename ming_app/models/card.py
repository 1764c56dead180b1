"""Writes the Hugging Face "card" of a GGUF base: config.json, tokenizer.json, tokenizer_config.json, generation_config.json.

The tokenizer is the official Qwen2 one, rebuilt from the vocabulary and merges in the file with the tokenizers library
alone (no transformers, no torch): NFC, the Qwen2 pre-tokenizer expression, byte-level BPE, and the added tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ming_app.models.gguf import GGUFFile, damaged
from ming_app.models.gguf_config import gguf_config, gguf_names
from ming_app.models.store import replacing, storage_errors, write_json

VERSION = 1  # raise when the files change: older cards are then written anew
MARK = "card.json"
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")

# transformers, models/qwen2/tokenization_qwen2.py; the tokenizer.json of every Qwen2 and Qwen2.5 release has the same
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's token types


def card_ready(home: Path) -> bool:
    """Whether `home` holds a whole card of this version."""
    try:
        mark = json.loads((home / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(mark, dict) and mark.get("version") == VERSION and all((home / name).is_file() for name in FILES)


def write_card(gguf: Path, home: Path, sha256: str) -> None:
    """Write the card of `gguf` into `home`, the mark of completeness last. Raises WeightsError, FetchError."""
    with GGUFFile(gguf) as file:
        config = gguf_config(file)
        gguf_names(file, config)
        tokenizer, tokenizer_config = _tokenizer(file)
        generation = _generation(file, tokenizer)
    with storage_errors(home):
        home.mkdir(parents=True, exist_ok=True)
        write_json(home / "config.json", config)
        with replacing(home / "tokenizer.json") as out:
            out.write(tokenizer.to_str(pretty=False).encode())
        write_json(home / "tokenizer_config.json", tokenizer_config)
        write_json(home / "generation_config.json", generation)
        write_json(home / MARK, {"version": VERSION, "sha256": sha256, "file": gguf.name})


def _tokenizer(file: GGUFFile) -> tuple[Any, dict[str, Any]]:
    """(tokenizers.Tokenizer, tokenizer_config.json)."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens, types, merges = _vocabulary(file)
    vocabulary = {token: index for index, token in enumerate(tokens) if types[index] == _NORMAL}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False))
    except Exception as error:  # the library raises bare Exception for merges that its vocabulary lacks
        raise damaged(file.path, f"its tokenizer is damaged ({error})", f"其中的分词器已损坏（{error}）") from error
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = {
        index: AddedToken(token, special=types[index] == _CONTROL, normalized=False)
        for index, token in enumerate(tokens)
        if types[index] in (_CONTROL, _USER_DEFINED)
    }
    # an added token takes the next free id, so ids only agree when they follow the vocabulary without a gap
    if list(added) != list(range(len(vocabulary), len(vocabulary) + len(added))):
        raise damaged(file.path, "its added tokens do not follow its vocabulary", "附加词元没有紧接在词表之后")
    for token in added.values():
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([token])
    return tokenizer, _tokenizer_config(file, tokens, added)


def _vocabulary(file: GGUFFile) -> tuple[list[str], list[int], list[tuple[str, str]]]:
    meta = file.metadata
    model, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if (model, pre) not in (("gpt2", "qwen2"), ("gpt2", "deepseek-r1-qwen")):
        raise damaged(
            file.path,
            f"its tokenizer ({model!r}, {pre!r}) is not Qwen2's; give this model as a Hugging Face folder instead",
            f"其分词器（{model!r}，{pre!r}）不是 Qwen2 的分词器；请改用该模型的 Hugging Face 文件夹",
        )
    tokens, types, merges = (meta.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges"))
    size = file.tensors["token_embd.weight"].shape[0]
    texts = [*tokens, *merges] if isinstance(tokens, list) and isinstance(merges, list) else [None]
    sound = isinstance(tokens, list) and isinstance(types, list) and all(isinstance(text, str) for text in texts)
    if not sound or len(tokens) != len(types) or len(tokens) > size or len(set(tokens)) != len(tokens):  # type: ignore[arg-type]
        raise damaged(file.path, "its vocabulary is incomplete or inconsistent", "其词表不完整或不一致")
    pairs = [tuple(merge.split(" ")) for merge in merges]  # type: ignore[union-attr]
    if any(len(pair) != 2 for pair in pairs) or set(types) - {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED}:  # type: ignore[arg-type]
        raise damaged(
            file.path, "its tokenizer has merges or token types of another kind", "其分词器的合并规则或词元类型异常"
        )
    return tokens, types, pairs  # type: ignore[return-value]


def _tokenizer_config(file: GGUFFile, tokens: list[str], added: dict[int, Any]) -> dict[str, Any]:
    def named(name: str) -> str | None:
        index = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else None

    config: dict[str, Any] = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(index): {
                "content": token.content,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token.special,
            }
            for index, token in added.items()
        },
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": named("eos"),
        "errors": "replace",
        "model_max_length": file.metadata[f"{file.metadata['general.architecture']}.context_length"],
        "pad_token": named("padding"),
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return config


def _generation(file: GGUFFile, tokenizer: Any) -> dict[str, Any]:
    """Token ids only: how to sample is the app's own setting."""
    ids = {
        name: file.metadata[key]
        for name in ("bos", "eos", "padding")
        if isinstance(file.metadata.get(key := f"tokenizer.ggml.{name}_token_id"), int)
    }
    # a chat model ends a turn with <|im_end|> and, now and then, a text with <|endoftext|>
    ends = [ids.get("eos"), tokenizer.token_to_id("<|endoftext|>")]
    return {
        "bos_token_id": ids.get("bos"),
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)),
        "pad_token_id": ids.get("padding"),
    }
