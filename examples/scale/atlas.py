"""An atlas by many engines at a time, by Ray Data; the same trace, report and tables as `python -m ming_app trace atlas`.

    python -m examples.scale.atlas --prompts examples/prompts.toml --out runs/atlas --model ming-moe-0.5b --engines 2 --threads 1

The actors keep each text's trace in OUT/traces, from which a run that was stopped goes on; on several machines let it be a
folder that all of them reach. What is merged are the traces that the actors give back, so that without such a folder only
going on elsewhere is lost.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from examples.scale.pool import over_engines
from ming_app.atlas import Text, read_texts, trace_text, write_atlas
from ming_app.engine.engine import Engine
from ming_app.errors import MingError
from ming_app.models.catalog import find_model
from ming_app.models.fetch import fetch
from ming_app.molora.trace import RouterTrace, Segment, merge
from ming_app.settings import Settings
from ming_app.trace_tools import ATLAS_TOKENS


def traces_of(
    engine: Engine, texts: list[Text], folder: Path, max_new_tokens: int
) -> list[tuple[RouterTrace, Segment]]:
    """What one actor does."""
    return [trace_text(engine, text, folder, max_new_tokens) for text in texts]


def make_atlas(
    texts: list[Text], out: Path, settings: Settings, *, engines: int, max_new_tokens: int = ATLAS_TOKENS
) -> dict[str, Any]:
    """Writes the atlas into `out` and gives what the command gives, with the seconds of the measuring."""
    out, adapter = out.resolve(), fetch(find_model(settings.model), settings).adapter
    began = time.monotonic()
    work = partial(traces_of, folder=out, max_new_tokens=max_new_tokens)
    trace = merge(over_engines(work, texts, settings, engines=engines, batch=1))
    spent = time.monotonic() - began
    written = write_atlas(trace, out, settings.message_lang(), adapter)
    return {
        "folder": str(out),
        "report": str(written),
        "texts": len(texts),
        "tokens": len(trace),
        "seconds": round(spent, 1),
        "engines": engines,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="texts or exam questions (TOML, JSON lines, text)")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--limit", type=int, default=0, help="so many texts, spread evenly")
    parser.add_argument("--max-new-tokens", type=int, default=ATLAS_TOKENS, help="of each answer")
    for name in ("model", "adapter", "precision", "lang"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--threads", type=int, default=1, help="of one engine, and the CPUs that ray keeps for it")
    args = parser.parse_args()
    chosen = ("model", "adapter", "precision", "lang", "threads")
    try:
        settings = Settings.load({name: getattr(args, name) for name in chosen})
        texts = read_texts(args.prompts, args.limit)
        found = make_atlas(texts, args.out, settings, engines=args.engines, max_new_tokens=args.max_new_tokens)
    except MingError as error:
        parser.exit(2, f"{error}\n")
    print(json.dumps(found, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
