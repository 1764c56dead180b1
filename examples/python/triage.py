"""Looks a text through for signs of an emergency, by rules and a score over words: no model, a millisecond or two.

    python -m examples.python.triage "my father suddenly cannot speak and his face droops" --region uk

It can miss: no warning is no all-clear.
"""

from __future__ import annotations

import argparse

from ming_app.safety.notices import assessed
from ming_app.safety.red_flags import assess
from ming_app.settings import REGIONS


def main() -> None:
    """What was found, which words said so, and the warning that the page would show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", help="messages of one person, oldest first")
    parser.add_argument("--region", choices=REGIONS, default="auto")
    options = parser.parse_args()

    found = assess(options.text)
    banner = assessed(found, region=options.region)
    if banner is None:
        print("No sign of an emergency found. This is no all-clear.")
        return
    for flag in found.flags:
        print(f"{flag.category}: {', '.join(flag.matched)}  (source: {flag.source})")
    print(banner.text)


if __name__ == "__main__":
    main()
