"""The card of a GGUF: the tokenizer gives the ids of transformers' own Qwen2 tokenizer; damaged vocabularies are refused."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from gguf import TokenType
from tokenizers import Tokenizer

from ming_app.errors import FetchError, WeightsError
from ming_app.models.card import FILES, card_ready, write_card
from tests.models.tiny_gguf import ADDED, MERGES, VOCAB, vocabulary, write_gguf

TEXTS = [
    "你好，头疼三天了，需要去医院吗？",
    "Hello hello, I'll take 2 mg/kg; what's next?\n\n  - x\t\ty  \r\n",
    "👩‍⚕️😀🇨🇳 emoji ❤️",
    "cafe\u0301 naïve \u1112\u1161\u11ab Å",  # decomposed: NFC must compose before splitting
    "def f(x):\n    return {'a': x ** 2}  # 1,234.5\n",
    "   \u3000全角１２３ \u00a0nbsp",
    "<|im_start|>user\nhi<|im_end|>\n<tool_call>{}",
    "",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    write_card(write_gguf(folder / "tiny.gguf"), folder / "home", "f" * 64)
    return folder / "home"


def parity(home: Path, texts: list[str]) -> None:
    """The card's tokenizer.json against the class of transformers, built from the bare vocabulary and merges."""
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    ours = Tokenizer.from_file(str(home / "tokenizer.json"))
    stored = json.loads((home / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = dict(stored["model"]["vocab"])
    theirs = Qwen2Tokenizer(vocab=vocab, merges=[tuple(merge) for merge in stored["model"]["merges"]])
    theirs.add_tokens([token["content"] for token in stored["added_tokens"]])
    for text in texts:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs(text, add_special_tokens=False).input_ids, text
        assert ours.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_ids_equal_transformers(home):
    parity(home, TEXTS)


@pytest.mark.real
@pytest.mark.parametrize("name", ["ming-moe-0.5b"])
def test_ids_of_the_embedded_base_equal_transformers(name):
    from ming_app.models.catalog import find_model
    from ming_app.models.fetch import fetch
    from ming_app.settings import Settings

    local = fetch(find_model(name), Settings.load({"adapter": "none"}))
    parity(local.home, TEXTS)
    tokenizer = Tokenizer.from_file(str(local.home / "tokenizer.json"))
    # ids of the published Qwen2.5 tokenizer
    assert tokenizer.encode("<|im_start|>user\nHello<|im_end|>").ids == [151644, 872, 198, 9707, 151645]
    assert tokenizer.get_vocab_size() == 151665


def test_added_tokens_keep_their_ids_and_padding_rows_have_no_text(home):
    tokenizer = Tokenizer.from_file(str(home / "tokenizer.json"))
    tokens, _ = vocabulary()
    for name in ADDED:
        assert tokenizer.token_to_id(name) == tokens.index(name)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    assert special == set(ADDED) - {"<tool_call>"}
    assert tokenizer.id_to_token(VOCAB - 1) is None
    assert tokenizer.decode([tokenizer.token_to_id("<|im_end|>")]) == ""


def test_config_files(home):
    tokens, _ = vocabulary()
    config = json.loads((home / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|im_end|>" and config["pad_token"] == "<|endoftext|>"
    assert "message.content" in config["chat_template"]
    generation = json.loads((home / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokens.index("<|im_end|>"), tokens.index("<|endoftext|>")]
    assert json.loads((home / "config.json").read_text())["vocab_size"] == VOCAB


def test_transformers_reads_the_card(home):
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(home)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    assert AutoConfig.from_pretrained(home).rope_parameters["rope_theta"] == 1e6


def test_a_card_is_whole_or_not_ready(tmp_path):
    gguf, home = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "home"
    assert not card_ready(home)
    write_card(gguf, home, "0" * 64)
    assert card_ready(home)
    (home / FILES[1]).unlink()
    assert not card_ready(home)
    write_card(gguf, home, "0" * 64)
    assert card_ready(home)
    assert sorted(path.name for path in home.iterdir()) == sorted([*FILES, "card.json"])


def test_a_card_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match="MING_CACHE_DIR"):
        write_card(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "file" / "home", "0" * 64)


def other_tokenizer(writer, data) -> None:
    writer.add_tokenizer_pre("llama-bpe")


def short_types(writer, data) -> None:
    writer.add_token_types(vocabulary()[1][:-1])


def twice_the_same(writer, data) -> None:
    tokens = vocabulary()[0]
    writer.add_token_list([*tokens[:-1], tokens[0]])


def foreign_merge(writer, data) -> None:
    writer.add_token_merges([*MERGES, "zz qq"])


def odd_merge(writer, data) -> None:
    writer.add_token_merges([*MERGES, "a b c"])


def byte_tokens(writer, data) -> None:
    types = vocabulary()[1]
    writer.add_token_types([int(TokenType.BYTE), *types[1:]])


def gap_in_added(writer, data) -> None:
    tokens, types = vocabulary()
    types[len(types) - 1] = int(TokenType.CONTROL)
    writer.add_token_types(types)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [other_tokenizer, short_types, twice_the_same, foreign_merge, odd_merge, byte_tokens, gap_in_added],
)
def test_other_or_damaged_tokenizers_are_refused(tmp_path, change):
    home = tmp_path / "home"
    with pytest.raises(WeightsError, match="token|vocabulary"):
        write_card(write_gguf(tmp_path / "bad.gguf", change=change), home, "0" * 64)
    assert not card_ready(home)
