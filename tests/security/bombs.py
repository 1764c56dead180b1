"""Run by test_security_bombs.py in a process of its own, whose memory is limited: opens every bomb in the folder named,
prints what became of each and the peak memory."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

LIMIT = 6 << 30  # of address space; torch alone maps more than a gigabyte

resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))

from ming_app.conversation.files import from_json  # noqa: E402
from ming_app.errors import MingError  # noqa: E402
from ming_app.exam.formats import read_bank  # noqa: E402
from ming_app.models.gguf import GGUFFile  # noqa: E402
from ming_app.models.safetensors_file import SafetensorsFile  # noqa: E402
from ming_app.molora.checkpoint import load_adapter  # noqa: E402
from ming_app.molora.trace import RouterTrace  # noqa: E402


def peak() -> int:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def bank(path: Path) -> object:
    return read_bank(path.read_bytes(), path.name)


READERS: dict[str, Callable[[Path], object]] = {
    "trace": RouterTrace.load,
    "bank": bank,
    "talk": lambda path: from_json(path.read_bytes()),
    "gguf": GGUFFile,
    "tensors": SafetensorsFile,
    "adapter": load_adapter,
}

found = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    before, begun = peak(), time.monotonic()
    try:
        READERS[path.name.partition("-")[0]](path)
        outcome = "read"
    except MingError as error:
        outcome = f"{type(error).__name__}: {error.en[-200:]}"
    except BaseException as error:
        outcome = f"ESCAPED {type(error).__name__}: {error}"[:300]
    found[path.name] = {"outcome": outcome, "more": peak() - before, "seconds": time.monotonic() - begun}
print("BOMBS " + json.dumps(found))
