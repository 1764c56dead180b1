"""Messages -> prompt ids, by id segments: text typed by a person can never become a control token.

Control tokens are put in by id; text is encoded by a tokenizer that does not know them (the same vocabulary and merges
with every added token taken out). The context budget keeps the system turn and the newest turn; oldest turns leave first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ming_app.engine.types import Message
from ming_app.errors import PromptTooLongError, UsageError, WeightsError
from ming_app.reading import read_bounded, whole_text

ROLES = ("system", "user", "assistant")
DEFAULT_SYSTEM = "You are a helpful assistant."
MIN_ANSWER_TOKENS = 64
MAX_TOKENIZER_BYTES = 128 << 20


def _byte_letters() -> dict[str, int]:
    """letter -> byte, as byte-level BPE writes bytes: those that print as themselves, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_BYTES = _byte_letters()


@dataclass(frozen=True)
class ChatFormat:
    """How a family writes a turn: control tokens by name, and the text between them."""

    start: tuple[str, ...]
    """control token(s) that open the prompt"""
    turn: str
    """control token before the role"""
    role_end: str
    """control token after the role; "" when none"""
    after_role: str
    """text between role and content"""
    end: str
    """control token after the content; the model writes it to end its answer"""
    after_end: str


CHAT_FORMATS = (
    ChatFormat((), "<|im_start|>", "", "\n", "<|im_end|>", "\n"),  # ChatML: Qwen and MING
    ChatFormat(("<|begin_of_text|>",), "<|start_header_id|>", "<|end_header_id|>", "\n\n", "<|eot_id|>", ""),  # Llama 3
)


@dataclass(frozen=True)
class Prompt:
    """Prompt ids and how many of the oldest turns were left out to make them fit."""

    ids: list[int]
    dropped_turns: int


class ChatTokenizer:
    """The tokenizer of one base and its chat format. Reads tokenizer.json only; imports neither torch nor transformers."""

    def __init__(self, tokenizer_json: str):
        """`tokenizer_json`: the text of the file. Raises WeightsError when it is damaged or has no known chat format."""
        try:
            self._full = Tokenizer.from_str(tokenizer_json)
            bare = json.loads(tokenizer_json)
            bare["added_tokens"] = []
            bare["post_processor"] = bare["truncation"] = bare["padding"] = None
            self._plain = Tokenizer.from_str(json.dumps(bare))
        except Exception as error:  # the tokenizers library raises bare Exception for damaged files
            raise WeightsError(f"tokenizer.json is damaged: {error}.", f"tokenizer.json 已损坏：{error}。") from error
        self._control = {token.content: token_id for token_id, token in self._full.get_added_tokens_decoder().items()}
        self._control_ids = frozenset(self._control.values())
        found = next((f for f in CHAT_FORMATS if f.turn in self._control and f.end in self._control), None)
        if found is None:
            raise WeightsError(
                "The tokenizer has none of the control tokens of a known chat format (ChatML, Llama 3).",
                "分词器中没有已知对话格式（ChatML、Llama 3）的控制符。",
            )
        self.format = found
        ends = (found.end, "<|endoftext|>", "<|end_of_text|>")
        self.stop_ids = frozenset(self._control[name] for name in ends if name in self._control)

    @classmethod
    def from_folder(cls, home: Path) -> Self:
        """The tokenizer in a model's home folder. Raises WeightsError."""
        path = home / "tokenizer.json"
        try:
            text = read_bounded(path, MAX_TOKENIZER_BYTES).decode("utf-8")
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path} cannot be read: {error}.", f"无法读取 {path}：{error}。") from error
        return cls(text)

    def encode_text(self, text: str) -> list[int]:
        """Ids of text that a person wrote (lone surrogates become U+FFFD). Never contains a control id."""
        ids = self._plain.encode(whole_text(text), add_special_tokens=False).ids
        forged = self._control_ids.intersection(ids)
        if forged:  # a vocabulary that lists control tokens among its merges: refuse rather than forge
            raise UsageError(
                "The text contains a control token of the model and was not sent.", "文本中含有模型的控制符，未发送。"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens written out."""
        return self._full.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, which need not be whole characters; its name where it is a control token."""
        word = self._full.id_to_token(token_id) or ""
        if token_id in self._control_ids or any(letter not in _BYTES for letter in word):
            return word.encode()
        return bytes(_BYTES[letter] for letter in word)

    def piece_stream(self) -> PieceStream:
        """A stream that turns ids into whole characters."""
        return PieceStream(self._full)

    def control_id(self, name: str) -> int:
        """Id of a control token by its name."""
        return self._control[name]

    def opening_ids(self) -> list[int]:
        """Control tokens that open every prompt of this format."""
        return [self._control[name] for name in self.format.start if name in self._control]

    def turn_ids(self, message: Message, *, closed: bool = True) -> list[int]:
        """Ids of one turn; not `closed` leaves out the end token, so that the model goes on writing it."""
        f = self.format
        ids = [self._control[f.turn]]
        if f.role_end:
            ids += [*self.encode_text(message.role), self._control[f.role_end]]
            ids += self.encode_text(f.after_role + message.content)
        else:
            ids += self.encode_text(message.role + f.after_role + message.content)
        if closed:
            ids += [self._control[f.end], *self.encode_text(f.after_end)]
        return ids

    def build(self, messages: Sequence[Message], context_limit: int, max_new_tokens: int) -> Prompt:
        """Prompt ids for a conversation that ends with a user turn, or with an assistant turn to be continued.

        Leaves room for min(max_new_tokens, a quarter of the context), never less than is useful, and drops oldest turns
        until that fits. Raises UsageError for a malformed conversation, PromptTooLongError when the newest turn alone
        does not fit.
        """
        system, turns = _split(messages)
        head = self.opening_ids() + self.turn_ids(system)
        continued = turns[-1].role == "assistant"
        tail = [] if continued else self.turn_ids(Message("assistant", ""), closed=False)
        newest = 2 if continued and len(turns) > 1 else 1
        reserve = max(min(max_new_tokens, context_limit // 4), min(MIN_ANSWER_TOKENS, max_new_tokens))
        limit = context_limit - reserve - len(head) - len(tail)
        blocks = [self.turn_ids(m, closed=not (continued and m is turns[-1])) for m in turns[-newest:]]
        needed = sum(len(block) for block in blocks)
        if needed > limit:
            raise PromptTooLongError(
                f"This message has {needed} tokens; at most {max(limit, 0)} fit beside the system prompt and room for an "
                "answer. Please shorten it or split it.",
                f"这条消息有 {needed} 个词元；除去系统提示和回答所需的空间，最多可容纳 {max(limit, 0)} 个。请缩短或拆分后再发送。",
            )
        first = len(turns) - newest
        while first:  # from the newest back, so that a conversation of any length costs no more than what fits
            block = self.turn_ids(turns[first - 1])
            needed += len(block)
            if needed > limit:
                break
            blocks.insert(0, block)
            first -= 1
        while first < len(turns) - newest and turns[first].role == "assistant":
            first += 1  # an answer without its question would mislead
            del blocks[0]
        kept = [token for block in blocks for token in block]
        return Prompt(head + kept + tail, first)


class PieceStream:
    """Ids in, whole characters out: a character split over byte tokens comes out once, with its last token."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str | None:
        """Text completed by this token ("" for a token without text), or None while a character is unfinished."""
        self._pending.append(token_id)
        text = self._stream.step(self._tokenizer, token_id)
        if text is None and self._tokenizer.decode(self._pending, skip_special_tokens=False) != "":
            return None
        self._pending.clear()
        return text or ""

    def flush(self) -> str:
        """What an unfinished character at the very end reads as (U+FFFD), "" when there is none."""
        text = "\ufffd" if self._pending else ""
        self._pending.clear()
        return text


def _split(messages: Sequence[Message]) -> tuple[Message, list[Message]]:
    """(system turn, other turns) of a conversation that is well formed."""
    for message in messages:
        if message.role not in ROLES:
            raise UsageError(
                f"A message has the role {message.role!r}; roles are {', '.join(ROLES)}.",
                f"消息的角色为 {message.role!r}；可用角色为 {'、'.join(ROLES)}。",
            )
    turns = [m for m in messages if m.role != "system"]
    systems = [m for m in messages if m.role == "system"]
    if not turns or all(not m.content.strip() for m in turns if m.role == "user"):
        raise UsageError("There is no question to answer.", "没有可回答的问题。")
    if len(systems) > 1 or (systems and messages[0].role != "system"):
        raise UsageError("At most one system message, and it comes first.", "系统消息最多一条，且须位于最前。")
    return (systems[0] if systems else Message("system", DEFAULT_SYSTEM)), turns
