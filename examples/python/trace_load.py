"""Reads a router trace (.npz) with numpy alone and prints how often each expert was chosen, answer tokens only.

    python -m examples.python.trace_load examples/atlas/trace.npz

A trace comes from the page, or from `python -m ming_app ask ... --trace FILE`. What the file holds: ming_app/molora/trace_file.py.
"""

from __future__ import annotations

import argparse
import json

import numpy as np


def main() -> None:
    """A row per projection, a column per expert; the even share is what experts without preferences would get."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    options = parser.parse_args()

    with np.load(options.file) as arrays:  # allow_pickle is off: a trace holds numbers and JSON only
        header = json.loads(arrays["header"].tobytes())
        experts = arrays["experts"]  # uint8 [tokens, layers, projections, k]
    answer = np.array([role == "answer" for _, _, role, *_ in header["tokens"]])
    count = header["num_experts"]
    print(f"{header['model']}: {answer.sum()} answer tokens, {experts.shape[1]} layers, {count} experts")
    print(f"{'':10}" + "".join(f"{f'expert {e}':>10}" for e in range(count)) + f"   even share {1 / count:.1%}")
    for p, projection in enumerate(header["projections"]):
        share = np.bincount(experts[answer][:, :, p].ravel(), minlength=count) / experts[answer][:, :, p].size
        print(f"{projection:10}" + "".join(f"{value:>10.1%}" for value in share))


if __name__ == "__main__":
    main()
