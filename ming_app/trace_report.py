"""Summary of a `RouterTrace` for the terminal and for `trace --json`: load per expert, per layer, per token.

Load of an expert: its share of the choices made (k per token, layer and projection); loads of E experts add up to 1,
and even use of all would give each 1 / E, which is shown beside them. Pure functions of the trace; no model.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ming_app.console import Console, printable
from ming_app.molora.trace import ROLES, RouterTrace
from ming_app.router.tables import load_table

BAR_WIDTH = 30


def summarize(trace: RouterTrace) -> dict[str, Any]:
    """JSON-ready summary; `layers` and `load.all` cover prompt and answer. Shares are rounded to 4 places."""
    roles = [token.role for token in trace.tokens]
    return {
        "model": trace.model,
        "fingerprint": trace.fingerprint,
        "prompt_tokens": roles.count("prompt"),
        "answer_tokens": roles.count("answer"),
        "num_layers": trace.num_layers,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "uniform": round(1 / trace.num_experts, 4),
        "load": {"all": _shares(trace)} | {role: _shares(trace, role=role) for role in ROLES},
        "layers": [
            {"layer": i} | {name: _shares(trace, layer=i, projection=name) for name in trace.projections}
            for i in range(trace.num_layers)
        ],
        "tokens": [
            {"text": text, "role": roles[members[0]], "load": _token_load(trace, members)}
            for text, members in trace.pieces()
        ],
    }


def _shares(trace: RouterTrace, **selection: Any) -> list[float]:
    """[E] shares of the choices in a selection of `load_table`."""
    return [round(expert.share, 4) for expert in load_table(trace, **selection)]


def _token_load(trace: RouterTrace, members: list[int]) -> list[float]:
    """[E] shares of the choices made for the tokens of one text piece, over all layers and projections."""
    counts = np.bincount(trace.experts[members].ravel(), minlength=trace.num_experts)
    return [round(float(share), 4) for share in counts / max(counts.sum(), 1)]


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """The same for people: totals, a bar per expert, a row per layer, each answer token with its busiest expert."""
    t, E = console.text, summary["num_experts"]
    console.line(
        t(
            f"{summary['model']}: {summary['prompt_tokens']} prompt + {summary['answer_tokens']} answer tokens, "
            f"{summary['num_layers']} layers, {E} experts, top-{summary['top_k']}",
            f"{summary['model']}：提示 {summary['prompt_tokens']} 词元，回答 {summary['answer_tokens']} 词元，"
            f"{summary['num_layers']} 层，{E} 个专家，top-{summary['top_k']}",
        )
    )
    console.line(
        t("\nLoad per expert", "\n各专家负载")
        + t(f" (even use: {summary['uniform']:.1%})", f"（均匀时为 {summary['uniform']:.1%}）")
    )
    for i in range(E):
        shares = {role: summary["load"][role][i] for role in ("all", *ROLES)}
        bar = "#" * round(shares["all"] * BAR_WIDTH)
        console.line(
            f"  {i:>3}  {shares['all']:6.1%}  {bar:<{BAR_WIDTH}}  "
            + t(
                f"prompt {shares['prompt']:.1%}, answer {shares['answer']:.1%}",
                f"提示 {shares['prompt']:.1%}，回答 {shares['answer']:.1%}",
            )
        )
    console.line(t("\nLoad per layer and projection, in percent", "\n各层各投影的负载（百分比）"))
    for row in summary["layers"]:
        cells = (
            f"{name} " + " ".join(f"{share * 100:3.0f}" for share in shares)
            for name, shares in row.items()
            if name != "layer"
        )
        console.line(f"  {row['layer']:>3}  " + "   ".join(cells))
    answer = [piece for piece in summary["tokens"] if piece["role"] == "answer"]
    if answer:
        console.line(t("\nAnswer, each token with its busiest expert", "\n回答及各词元最常用的专家"))
        console.line(
            "  " + " ".join(f"{printable(p['text']).strip() or '␣'}/{int(np.argmax(p['load']))}" for p in answer)
        )
