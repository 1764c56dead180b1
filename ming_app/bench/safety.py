"""The safety layer's figure: looking one message through for signs of an emergency, in milliseconds. Needs no model.

The messages are the stems of examples/banks and a few lay ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from ming_app.bench.peers import Setup
from ming_app.exam.bank import Shelf
from ming_app.safety.red_flags import assess

LAY = (
    "my husband has crushing chest pain and is sweating",
    "我爸突然说话不清，右手抬不起来",
    "how much sleep does a teenager need?",
    "孩子感冒三天了，不发烧，流清鼻涕，要吃药吗",
)


def safety_peer(_setup: Setup) -> Callable[[str], float]:
    """Measures "triage": the median over the messages."""
    shelf = Shelf()
    messages = [*LAY, *(q.stem for bank in shelf.list() for q in shelf.open(bank.name).questions)]
    assess(messages[:1])

    def measure(_name: str) -> float:
        times = []
        for message in messages:
            start = time.perf_counter()
            assess([message])
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1000

    return measure
