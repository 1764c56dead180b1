"""Speed and memory of this machine, each figure beside the one it is compared with.

Every peer (our engine, our engine without adapter, llama.cpp, transformers' generate) runs in a process of its own with
the same number of threads. Rounds are interleaved: each round measures every case once, a ratio is the median over
rounds of the ratio within a round, so that a busy moment hits both sides. A peer that is not installed is reported
as missing, never guessed.
"""

from ming_app.bench.cases import CASES, print_results, run_bench

__all__ = ["CASES", "print_results", "run_bench"]
