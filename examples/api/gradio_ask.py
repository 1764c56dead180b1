"""Asks a running page, served by oneself or as a Space, through gradio_client: its one endpoint is /ask.

python app.py                     # or python -m ming_app serve, in another terminal
python -m examples.api.gradio_ask "发烧三天要注意什么？" http://127.0.0.1:7860 --lang zh

The address may also be a Space's OWNER/NAME.
"""

from __future__ import annotations

import argparse

from gradio_client import Client


def main() -> None:
    """Prints a warning of an emergency first, the answer as it comes, then the notes and the label."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("address", nargs="?", default="http://127.0.0.1:7860")
    parser.add_argument("--lang", choices=("en", "zh"), default="en", help="of warning, notes and errors")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--seed", type=int, default=-1, help="0 and up: reproducible")
    options = parser.parse_args()

    client = Client(options.address, verbose=False)
    job = client.submit(options.question, options.lang, options.max_new_tokens, options.seed, api_name="/ask")
    shown = 0
    for number, said in enumerate(job):  # each holds the whole answer so far
        if number == 0 and said["warning"]:
            print(f"! {said['warning']}")
        print(said["text"][shown:], end="", flush=True)
        shown = len(said["text"])
    job.result()  # raises what the page refused it with
    last = job.outputs()[-1]
    print("", *(f"! {note}" for note in last["notes"]), f"({last['ai_label']})", sep="\n")


if __name__ == "__main__":
    main()
