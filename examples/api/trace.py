"""Asks a running server which experts fired, keeps the trace as a file, and prints how often each expert was chosen.

python -m ming_app serve          # in another terminal
python -m examples.api.trace http://127.0.0.1:7860 --out answer.npz
python -m ming_app trace answer.npz

`router_trace` is a field of our own: OpenAI's client passes it on through `extra_body`. Key: OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import openai

from ming_app.molora.trace import RouterTrace
from ming_app.router.tables import load_table


def main() -> None:
    """A row per expert: its share of all choices, beside what even use would give."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", nargs="?", default="http://127.0.0.1:7860")
    parser.add_argument("--question", default="贫血有哪些常见原因？")
    parser.add_argument("--out", default="answer.npz", help=".npz or .json")
    parser.add_argument("--max-tokens", type=int, default=60)
    options = parser.parse_args()

    client = openai.OpenAI(base_url=f"{options.address}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
    reply = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": options.question}],
        max_tokens=options.max_tokens,
        temperature=0,
        extra_body={"router_trace": True},
    )
    with tempfile.TemporaryDirectory() as folder:  # the field is the content of a trace file in JSON
        file = Path(folder) / "trace.json"
        file.write_text(json.dumps(reply.model_extra["ming"]["router_trace"]), encoding="utf-8")
        trace = RouterTrace.load(file)
    print(f"{trace.save(options.out)}: {len(trace.tokens)} tokens, even share {1 / trace.num_experts:.1%}")
    for expert in load_table(trace, role="answer"):
        print(f"expert {expert.expert}  {expert.share:6.1%}  {'#' * round(60 * expert.share)}")


if __name__ == "__main__":
    main()
