"""Valid files made hostile: bits flipped, parts cut out, doubled or replaced, fields of JSON exchanged for odd values."""

from __future__ import annotations

import contextlib
import io
import json
import random
import struct
import zipfile
import zlib
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**70, -(2**70), 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *(
        "",
        "1",
        "a" * 2_000,
        "../../etc/passwd",
        "/dev/zero",
        "\x00",
        "\u202e",
        "\ud800",
        "<img src=x onerror=alert(1)>",
        "=1+1",
    ),
    *([], {}, [[]], [None], {"": None}, [0] * 50, [[[[1]]]], ["a"], {"a": {"a": {}}}),
)
NUMBERS = (0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


def mutated(data: bytes, rnd: random.Random) -> bytes:
    """A change of a file, or a few; of its fields where it is JSON, or begins with a JSON header (safetensors)."""
    for _ in range(rnd.choice((1, 1, 1, 2, 4))):
        data = _once(data, rnd)
    return data


def _once(data: bytes, rnd: random.Random) -> bytes:
    if data[:2] == b"PK" and rnd.random() < 0.8:
        with contextlib.suppress(
            zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError, zlib.error
        ):
            return _repacked(data, rnd)
    if rnd.random() < 0.8:
        try:
            return json.dumps(mutated_value(json.loads(data), rnd)).encode()
        except (ValueError, RecursionError):
            pass
        length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
        if data[8:9] == b"{" and length <= len(data) - 8:
            try:
                head = json.dumps(mutated_value(json.loads(data[8 : 8 + length]), rnd)).encode()
                return struct.pack("<Q", len(head)) + head + data[8 + length :]
            except ValueError:
                pass
    return _bytes(bytearray(data), rnd)


def _repacked(data: bytes, rnd: random.Random) -> bytes:
    """An archive with a change in one of its members, or in a name, and sums that are right again."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        members = {name: old.read(name) for name in old.namelist()}
        victim = rnd.choice(sorted(members))
        for name, body in members.items():
            body = mutated(body, rnd) if name == victim else body
            new.writestr(rnd.choice((name, name, name, f"../{name}", f"x{name}")) if name == victim else name, body)
    return out.getvalue()


def mutated_value(value: Any, rnd: random.Random) -> Any:
    """The value with one entry somewhere in it replaced, renamed, left out or doubled."""
    if isinstance(value, dict) and value and rnd.random() < 0.93:
        key = rnd.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        kind = rnd.random()
        if kind < 0.1:
            return rest
        if kind < 0.2:
            return {**rest, rnd.choice([str(odd)[:50] for odd in ODD]): value[key]}
        return {**value, key: mutated_value(value[key], rnd)}
    if isinstance(value, list) and value and rnd.random() < 0.93:
        at, kind = rnd.randrange(len(value)), rnd.random()
        if kind < 0.1:
            return value[:at] + value[at + 1 :]
        if kind < 0.2:
            return [*value, value[at]]
        return [*value[:at], mutated_value(value[at], rnd), *value[at + 1 :]]
    return rnd.choice(ODD)


def _bytes(data: bytearray, rnd: random.Random) -> bytes:
    if not data:
        return bytes(rnd.randbytes(8))
    at = min(rnd.randrange(len(data)), rnd.randrange(len(data)))  # headers stand in front
    match rnd.randrange(6):
        case 0:
            data[at] ^= 1 << rnd.randrange(8)
        case 1:
            del data[at:]
        case 2:
            del data[at : at + rnd.randint(1, 16)]
        case 3:
            data[at:at] = data[at : at + rnd.randint(1, 64)]
        case 4:
            form = rnd.choice(("<H", "<I", "<Q", ">I"))
            number = rnd.choice(NUMBERS) & ((1 << 8 * struct.calcsize(form)) - 1)
            data[at : at + struct.calcsize(form)] = struct.pack(form, number)
        case _:
            data[at : at + 4] = rnd.choice(
                (b"\x00" * 4, b"\xff" * 4, "\u202e".encode(), b"\xed\xa0\x80", b"<!DO", b'"]}{')
            )
    return bytes(data)
