"""From users a day to replicas, machines and cost, by figures measured with `python -m ming_app bench` (examples/bench).

    python -m examples.scale.plan
    python -m examples.scale.plan --users 5000 --model ming-moe-0.5b --json
    python -m examples.scale.plan --gpu-tokens-per-second 900 --gpu-price 0.80

Everything that was not measured is an option with its assumption as default, and is printed with the result.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parents[1] / "bench"
USERS = (10, 1_000, 1_000_000)
DAY, MONTH_HOURS = 86_400, 730
STREAMS = 8  # answers at a time in the case streams-8
CPU_PRICE = 0.03  # $/h of a "CPU upgrade" Space, 8 vCPU and 32 GB: Hugging Face's documentation of 2026-08-22
GPU_PRICE = 0.80  # $/h of an L4 Space, 24 GB: the same


def measured(model: str) -> dict[str, float]:
    """Medians of the stored report: tokens/s of eight answers together, tokens/s of reading, bytes of memory, cores."""
    report = json.loads((BENCH / f"{model}.json").read_text(encoding="utf-8"))
    medians = {one["name"]: one["median"] for one in report["results"]}
    return {
        "write": medians[f"streams-{STREAMS}"],
        "read": medians["prefill512"],
        "memory": medians["rss"],
        "cores": report["machine"]["cores"],
    }


def plan(users: int, engine: dict[str, float], a: argparse.Namespace) -> dict[str, Any]:
    """What so many users a day need at their peak. A replica writes and reads by turns; `busy`: its seconds per question."""
    questions = users * a.questions / DAY * a.peak
    busy = a.tokens / engine["write"] + a.new_prompt / engine["read"]
    lasts = a.tokens / (engine["write"] / STREAMS) + a.new_prompt / engine["read"]
    replicas = max(1, math.ceil(questions * busy / a.utilisation))
    each = max(1, min(int(a.machine_cores // engine["cores"]), int(a.machine_memory * 1e9 // engine["memory"])))
    machines = math.ceil(replicas / each)
    row = {
        "users": users,
        "questions_per_second": questions,
        "answers_at_a_time": questions * lasts,
        "tokens_per_second": questions * a.tokens,
        "seconds_per_answer": lasts,
        "replicas": replicas,
        "machines": machines,
        "dollars_per_month": machines * a.price * MONTH_HOURS,
    }
    if a.gpu_tokens_per_second:
        gpus = max(1, math.ceil(questions * a.tokens / a.gpu_tokens_per_second / a.utilisation))
        row |= {"gpus": gpus, "gpu_dollars_per_month": gpus * a.gpu_price * MONTH_HOURS}
    return row


def assumptions(engine: dict[str, float], a: argparse.Namespace) -> list[str]:
    """What the table rests on, a line each."""
    gpu = (
        f"GPU: {a.gpu_tokens_per_second:g} tokens/s each as you say (--gpu-tokens-per-second), ${a.gpu_price:g}/h"
        if a.gpu_tokens_per_second
        else "GPU: no rows. This project has not measured a GPU's throughput; give yours with --gpu-tokens-per-second"
    )
    return [
        f"measured (examples/bench/{a.model}.json), one replica on {engine['cores']:g} cores: {engine['write']:.0f} tokens/s written "
        f"by {STREAMS} answers together, {engine['read']:.0f} tokens/s read, {engine['memory'] / 1e9:.2f} GB",
        f"assumed: {a.questions:g} questions per user and day, {a.tokens:g} tokens per answer, {a.new_prompt:g} new tokens per "
        f"question, a peak of {a.peak:g} times the mean, {a.utilisation:.0%} of a replica used at the peak",
        f"assumed: a machine has {a.machine_cores:g} cores and {a.machine_memory:g} GB, costs ${a.price:g}/h, and as many replicas as "
        "fit do not slow each other down (not measured: they share its memory's bandwidth)",
        "assumed: sized for the peak at all hours; a conversation stays on its replica, so that only new tokens are read",
        "not counted: the page and API in front of the replicas, whose own limit was not measured",
        gpu,
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """As people read it."""
    names = list(rows[0])
    cells = [[name.replace("_", " ") for name in names]]
    cells += [[f"{row[n]:,}" if isinstance(row[n], int) else f"{row[n]:,.2f}" for n in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in cells)


def positive(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError("must be a number above 0")
    return value


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    models = sorted(path.stem for path in BENCH.glob("*.json"))
    add("--users", type=int, action="append", help="a day; may be given several times")
    add("--model", default="ming-moe-1.5b", choices=models)
    add("--questions", type=positive, default=5, help="of a user a day")
    add("--tokens", type=positive, default=250, help="of an answer")
    add("--new-prompt", type=positive, default=60, help="tokens of a question that no replica remembers")
    add("--peak", type=positive, default=3, help="busiest hour over the mean one")
    add("--utilisation", type=positive, default=0.7, help="of a replica at the peak; above, waiting grows fast")
    add("--machine-cores", type=positive, default=8)
    add("--machine-memory", type=positive, default=32, help="GB")
    add(
        "--price", type=positive, default=CPU_PRICE, help="$/h of a machine; a CPU-upgrade Space, documented 2026-08-22"
    )
    add(
        "--gpu-tokens-per-second",
        type=positive,
        default=0,
        help="of one GPU, all its answers together: yours, measured",
    )
    add("--gpu-price", type=positive, default=GPU_PRICE, help="$/h of a GPU; an L4 Space, documented 2026-08-22")
    add("--json", action="store_true")
    return made


def main(words: list[str] | None = None) -> None:
    made = parser()
    a = made.parse_args(words)
    users = a.users or list(USERS)
    if min(users) < 1 or a.utilisation > 1:
        made.error("--users is at least 1, --utilisation at most 1")
    engine = measured(a.model)
    rows = [plan(one, engine, a) for one in users]
    if a.json:
        print(json.dumps({"model": a.model, "rows": rows, "assumptions": assumptions(engine, a)}, indent=1))
    else:
        print(table(rows), *(f"- {line}" for line in assumptions(engine, a)), sep="\n")


if __name__ == "__main__":
    main()
