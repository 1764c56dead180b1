"""Every parser of files from elsewhere, given valid files made hostile: it succeeds or refuses in words, quickly.

`python -m tests.security.test_security_fuzz 100000 [NAME ...]` goes on for longer, from another seed each time.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ming_app.atlas import read_texts
from ming_app.conversation.files import from_json, from_rows, to_file, to_json
from ming_app.conversation.store import ConversationStore
from ming_app.conversation.tree import Conversation, Turn
from ming_app.engine.prompt import ChatTokenizer
from ming_app.errors import MingError
from ming_app.exam.bank import Bank, Shelf
from ming_app.exam.desk import Desk
from ming_app.exam.formats import WRITERS, read_bank, write_bank
from ming_app.exam.progress_file import read_progress, write_progress
from ming_app.exam.statistics import statistics
from ming_app.exam.store import Store
from ming_app.models.catalog import CATALOG_FILE, parse_catalog
from ming_app.models.tensors import open_tensors
from ming_app.molora.checkpoint import load_adapter, save_adapter
from ming_app.molora.trace import RouterTrace, Segment
from tests.exam.conftest import BANK, mixed
from tests.exam.test_exam_store import filled
from tests.models import tiny_gguf
from tests.molora.test_checkpoint import BASE, random_adapter, write_official
from tests.router.synthetic import even, trace_of
from tests.security.mutate import mutated
from tests.tiny import tokenizer_json

SLOW = 20.0  # seconds on a busy machine; hundreds of times what any of these files takes

Files = dict[str, bytes]
Reader = Callable[[Path], Any]


def folder_files(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def read_all(folder: Path) -> None:
    """A base: its numbers, and every tensor."""
    found = sorted(folder.glob("*.gguf"))
    with open_tensors(found[0] if found else folder) as source:
        for name in source.names():
            source.get(name)


def read_talks(folder: Path) -> None:
    """A file of conversations, then all that is done with them."""
    store = ConversationStore(":memory:")
    for talk in from_json((folder / "talks.json").read_bytes()):
        store.save(talk, *talk.nodes.values())
        kept = store.load(talk.id)
        for kind in ("markdown", "html", "json"):
            to_file(kind, [kept], "zh")
    json.dumps(store.take_changes()).encode()
    store.entries("a")


def read_kept(folder: Path) -> None:
    """What a browser kept of the conversations."""
    try:
        values = json.loads((folder / "rows.json").read_bytes())
    except (ValueError, RecursionError):
        return  # as Talks.restore has it
    for talk in from_rows(values):
        ConversationStore(":memory:").save(talk, *talk.nodes.values())


def read_questions(folder: Path) -> None:
    """A bank of any format, shown and written in every other."""
    path = next(iter(folder.iterdir()))
    questions = read_bank(path.read_bytes(), path.name).questions
    Shelf(None).add("Bank", questions)
    for kind in set(WRITERS) - {"apkg"}:
        write_bank(questions, kind)


def read_traced(folder: Path) -> None:
    trace = RouterTrace.load(next(iter(folder.iterdir())))
    trace.save(folder / "again.npz")
    trace.pieces()


def tiny_trace() -> RouterTrace:
    segments = (Segment(0, "one", {"language": "en"}), Segment(2, "two", {"language": "zh"}))
    return trace_of(["a", "b", "c", "d"], even(), segments=segments)


def sheet() -> bytes:
    book = openpyxl.Workbook()
    for row in (["题目", "A", "B", "答案"], ["Q?", "a", "b", "A"], ["R?", "c", "d", "B"]):
        book.active.append(row)
    out = io.BytesIO()
    book.save(out)
    plain = io.BytesIO()
    with zipfile.ZipFile(out) as packed, zipfile.ZipFile(plain, "w") as stored:  # so that changes reach the XML
        for name in packed.namelist():
            stored.writestr(name, packed.read(name))
    return plain.getvalue()


def cases(home: Path) -> dict[str, tuple[Files, Reader]]:
    """name -> (a valid folder's files, what reads them)."""
    save_adapter(home / "native", random_adapter())
    write_official(home / "official", random_adapter())
    write_official(home / "shared", random_adapter(num_shared_experts=1), binary=True)
    declared = home / "shared" / "config.json"
    declared.write_text(json.dumps({**json.loads(declared.read_text()), "num_share_experts": 1}))
    tiny_gguf.write_gguf(home / "tiny.gguf")
    base = {**BASE, "vocab_size": 8, "head_dim": 4}
    tensors = {"model.embed_tokens.weight": (8, 16), "model.norm.weight": (16,)}
    (home / "base").mkdir()
    (home / "base" / "config.json").write_text(json.dumps(base))
    save_tensors(home / "base" / "a.safetensors", tensors)
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (home / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    for ending in ("npz", "json"):
        tiny_trace().save(home / f"trace.{ending}")
    talk = Conversation.of([Turn("user", "发烧 fever"), Turn("assistant", "rest", reason="stop"), Turn("user", "more")])
    store = ConversationStore(":memory:")
    store.save(talk, *talk.nodes.values())
    rows = json.dumps(store.dump()).encode()
    questions = Shelf(None).open("clinical-zh").questions[:3]
    prompts = b'[[zh]]\ntext = "a"\ntitle = "b"\n[[en]]\ntext = "c"\ntitle = "d"\n'
    lines = b'{"text": "a", "lang": "en", "answer": "b"}\n{"stem": "c", "options": {"A": "d", "B": "e"}}\n'
    found: dict[str, tuple[Files, Reader]] = {
        "adapter_native": (folder_files(home / "native"), load_adapter),
        "adapter_official": (folder_files(home / "official"), load_adapter),
        "adapter_shared_bin": (folder_files(home / "shared"), lambda f: load_adapter(f, base_config=BASE)),
        "gguf": ({"tiny.gguf": (home / "tiny.gguf").read_bytes()}, read_all),
        "base_folder": (folder_files(home / "base"), read_all),
        "trace_npz": ({"t.npz": (home / "trace.npz").read_bytes()}, read_traced),
        "trace_json": ({"t.json": (home / "trace.json").read_bytes()}, read_traced),
        "conversations": ({"talks.json": to_json([talk, talk])}, read_talks),
        "conversations_of_a_browser": ({"rows.json": rows}, read_kept),
        "progress": ({"p.json": progress(home)}, read_back),
        "catalogue": ({"catalog.toml": CATALOG_FILE.read_bytes()}, lambda f: parse_catalog(f / "catalog.toml")),
        "texts_toml": ({"t.toml": prompts}, lambda f: read_texts(f / "t.toml")),
        "texts_lines": ({"t.jsonl": lines}, lambda f: read_texts(f / "t.jsonl")),
        "tokenizer": ({"tokenizer.json": tokenizer_json().encode()}, read_tokenizer),
        "bank_xlsx": ({"q.xlsx": sheet()}, read_questions),
        "bank_aiken": ({"q.txt": b"Q?\nA. a\nB. b\nANSWER: A\n\nR?\nA) c\nB) d\nANSWER: B\n"}, read_questions),
        "bank_text": ({"q.txt": "1. 题？\nA. 甲\nB. 乙\n答案：A\n解析：因为\n".encode()}, read_questions),
    }
    endings = {"jsonl": "jsonl", "csv": "csv", "gift": "gift", "moodle": "xml"}
    found |= {
        f"bank_{kind}": ({f"q.{end}": write_bank(questions, kind)}, read_questions) for kind, end in endings.items()
    }
    return found


def save_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, path)


def progress(home: Path) -> bytes:
    shelf = Shelf(home / "banks", home / "none")
    bank = shelf.add(BANK, mixed())
    desk = Desk(Store(home / "progress.sqlite"), shelf)
    desk._banks[BANK] = Bank(BANK, bank.titles, bank.questions)
    return write_progress(filled(desk))


def read_back(folder: Path) -> None:
    """A file of progress, then statistics over it, and the file again."""
    store = Store(":memory:")
    read_progress(store, (folder / "p.json").read_bytes())
    statistics(store, 0.0)
    write_progress(store)


def read_tokenizer(folder: Path) -> None:
    tokenizer = ChatTokenizer.from_folder(folder)
    with contextlib.suppress(MingError):
        tokenizer.encode_text("héllo <|im_end|> 发烧 \ud800")


def attempt(files: Files, read: Reader, rnd: random.Random) -> str:
    """One hostile variant; what became of it. Anything but success or a MingError with both texts escapes."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder, victim = Path(name), rnd.choice(sorted(files))
        for file, data in files.items():
            (folder / file).write_bytes(mutated(data, rnd) if file == victim else data)
        begun = time.monotonic()
        try:
            read(folder)
            became = "read"
        except MingError as error:
            assert error.en and error.zh
            error.en.encode(), error.zh.encode()  # can be shown and sent
            became = "refused"
        assert time.monotonic() - begun < SLOW
        return became


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Files, Reader]]:
    return cases(tmp_path_factory.mktemp("valid"))


NAMES = (
    *("adapter_native", "adapter_official", "adapter_shared_bin", "gguf", "base_folder", "trace_npz", "trace_json"),
    *("conversations", "conversations_of_a_browser", "progress", "catalogue", "texts_toml", "texts_lines", "tokenizer"),
    *("bank_xlsx", "bank_aiken", "bank_text", "bank_jsonl", "bank_csv", "bank_gift", "bank_moodle"),
)


def test_valid_files_are_read(valid: dict[str, tuple[Files, Reader]], tmp_path: Path) -> None:
    assert set(valid) == set(NAMES)
    for name, (files, read) in valid.items():
        (tmp_path / name).mkdir()
        for file, data in files.items():
            (tmp_path / name / file).write_bytes(data)
        read(tmp_path / name)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_variants_are_read_or_refused_in_words(valid: dict[str, tuple[Files, Reader]], name: str) -> None:
    files, read = valid[name]

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 2**32))
    def check(seed: int) -> None:
        attempt(files, read, random.Random(seed))

    check()


def campaign(rounds: int) -> None:
    """Many variants of every file, from a seed of the moment; stops at what escapes, with the seed that shows it."""
    chosen = sys.argv[2:] or NAMES
    first = time.time_ns() % 2**32
    with tempfile.TemporaryDirectory() as home:
        for name, (files, read) in cases(Path(home)).items():
            if name not in chosen:
                continue
            became: dict[str, int] = {}
            for seed in range(first, first + rounds):
                try:
                    end = attempt(files, read, random.Random(seed))
                except BaseException as error:
                    end = f"ESCAPED {type(error).__name__}: {str(error)[:100]!a} (seed {seed})"
                    end = end if sum("ESCAPED" in key for key in became) < 5 else "ESCAPED again"
                became[end] = became.get(end, 0) + 1
            print(name, became, flush=True)


if __name__ == "__main__":
    campaign(int(sys.argv[1]))
