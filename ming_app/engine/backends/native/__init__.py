"""The CPU engine: quantised weights, MoLoRA and routing in kernels of our own, compiled by numba for the processor at hand.

    layout.py    names and sizes that all share           formats.py   weights into blocks, exactly where a GGUF has them
    vector.py    vectors for numba                        tiles.py     the inner loops
    products.py  threads and their products               kernels.py   one step of the decoder
    cache.py     the KV cache, in pages
    spec.py      what a built engine is                   build.py     building it once
    backend.py   the engine behind `Backend`

Why our own: measured on two cores, no library that installs from PyPI alone reads 4-bit weights at the speed of memory for one
token and still gains from eight (ONNX Runtime's MatMulNBits: 22 of 36 GB/s, three times the tokens at a batch of eight; here
28 GB/s and five times), none keeps the exact values of GGUF blocks, and a row's result must not depend on its batch.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def keep_kernels_in(cache_dir: Path) -> None:
    """Where compiled kernels are kept between runs. To be called before backend.py is imported."""
    from numba.core import config

    folder = cache_dir.expanduser().absolute() / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:  # read-only: they are compiled again on every start
        folder = Path(tempfile.mkdtemp(prefix="ming-kernels-"))
    if not os.environ.get("NUMBA_CACHE_DIR"):
        setattr(config, "CACHE_DIR", str(folder))  # noqa: B010  # numba makes its settings as it starts
