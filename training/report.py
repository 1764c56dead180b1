"""Tables and texts that the training commands print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from training.chat import ChatTokenizer
from training.mix import Mix
from training.packing import Sample


def table(head: Sequence[str], rows: Sequence[Iterable[Any]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns to the left, the others to the right."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def data_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a mix holds, from `Mix.census`: streams, then their sources, then what was dropped and why."""
    streams = table(
        ("stream", "languages", "rows", "tokens", "in answers", "held out", "share of rows", "of tokens"),
        [
            (
                row["stream"],
                " ".join(row["languages"]),
                f"{row['rows']:,}",
                f"{row['tokens']:,}",
                f"{row['answer_tokens']:,}",
                row["held_out"],
                f"{row['share_of_rows']:.1%}",
                f"{row['share_of_tokens']:.1%}",
            )
            for row in rows
        ],
        left=2,
    )
    sources = table(
        ("stream", "source", "licence", "origin", "rows"),
        [
            (row["stream"], name, source["licence"] or "none stated", source["origin"], f"{source['rows']:,}")
            for row in rows
            for name, source in row["sources"].items()
        ],
        left=4,
    )
    lost = [(row["stream"], reason, f"{count:,}") for row in rows for reason, count in row["dropped"].items()]
    lost += [
        (row["stream"], "broken: " + "; ".join(row["broken"]), row["broken_lines"]) for row in rows if row["broken"]
    ]
    dropped = "\n\n" + table(("stream", "dropped because", "rows"), lost, left=2) if lost else ""
    return f"{streams}\n\n{sources}{dropped}"


def shown_samples(mix: Mix, count: int) -> list[dict[str, Any]]:
    """The first samples of a run; `marked` is their text with what is learnt between guillemets."""
    return [
        {
            "stream": sample.stream,
            "source": sample.source,
            "tokens": len(sample.encoded),
            "learnt": int(sample.encoded.mask.sum()),
            "marked": marked(sample, mix.tokenizer),
        }
        for sample in mix.first_samples(count)
    ]


def marked(sample: Sample, tokenizer: ChatTokenizer) -> str:
    """The sample's text, control tokens written out, learnt runs in `⟦ ⟧`."""
    ids, mask = sample.encoded.ids.tolist(), sample.encoded.mask.tolist()
    text, start = "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[start]:
            run = tokenizer.decode(ids[start:end])
            text += f"⟦{run}⟧" if mask[start] else run
            start = end
    return text
