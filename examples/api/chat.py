"""Asks a running server in Chinese and in English through OpenAI's client, streaming; a warning of an emergency comes first.

python -m ming_app serve          # in another terminal
python -m examples.api.chat http://127.0.0.1:7860 --max-tokens 200

The key is read from OPENAI_API_KEY; a server without MING_API_KEYS takes any.
"""

from __future__ import annotations

import argparse
import os

import openai

QUESTIONS = ("我突然胸口剧痛，还出冷汗，怎么办？", "What does HbA1c measure?")


def main() -> None:
    """Prints what the server says beside an answer, then the answer as it comes, then the notes and the label."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", nargs="?", default="http://127.0.0.1:7860")
    parser.add_argument("--question", action="append", help="instead of the two above; may be repeated")
    parser.add_argument("--max-tokens", type=int, default=200)
    options = parser.parse_args()

    client = openai.OpenAI(base_url=f"{options.address}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
    model = client.models.list().data[0].id
    for question in options.question or QUESTIONS:
        print(f"> {question}")
        chunks = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            max_tokens=options.max_tokens,
            stream=True,
        )
        for number, chunk in enumerate(chunks):
            ming = chunk.model_extra.get("ming")  # what is the server's own: at the first chunk and the last
            if number == 0 and ming["warning"]:
                print(f"! {ming['warning']['title']} {ming['warning']['action']}")
            if chunk.choices and chunk.choices[0].delta.content:
                print(chunk.choices[0].delta.content, end="", flush=True)
            if number and ming:
                print("", *(f"! {note['note']}" for note in ming["notes"]), f"({ming['ai_label']})\n", sep="\n")


if __name__ == "__main__":
    main()
