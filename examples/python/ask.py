"""Asks one question and prints the answer as it comes, then the expert that fired most for each piece of it.

python -m examples.python.ask "What is anaemia?" --model ming-moe-0.5b
"""

from __future__ import annotations

import argparse
from contextlib import closing

from ming_app.engine.engine import Engine
from ming_app.engine.types import Finish, Message, SamplingParams, Token
from ming_app.settings import Settings


def main() -> None:
    """Streams the answer; `--greedy` makes it the same every time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--model", help="a name of weights/catalog.toml, a folder or a hub id")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--greedy", action="store_true")
    options = parser.parse_args()

    params = SamplingParams(options.max_new_tokens, temperature=0.0 if options.greedy else 0.7)
    with closing(Engine.load(Settings.load({"model": options.model}))) as engine:
        layer, gate = engine.info.num_layers // 2, 0
        fired: list[str] = []
        for event in engine.stream([Message("user", options.question)], params):
            if isinstance(event, Token):
                print(event.text, end="", flush=True)
                if event.experts is not None:  # [tokens of the piece, layers, projections, k], largest logit first
                    fired.append(f"{event.text!r}:{event.experts[-1, layer, gate, 0]}")
            elif isinstance(event, Finish):
                print(
                    f"\n\n{event.new_tokens} tokens, {event.timings.tokens_per_second:.1f} per second, {event.reason}"
                )
    print(f"Top expert in layer {layer}, gate: {' '.join(fired[:20])}")
    print("AI-generated. For learning only, not medical advice.")


if __name__ == "__main__":
    main()
