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

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from ming_app.settings import default_cache_dir

_kept_in: Path | None = None


def keep_kernels_in(cache_dir: Path | None = None) -> Path:
    """Where compiled kernels are kept between runs: a folder of this version of them, for numba would take old ones for new
    where another file than theirs has changed. The first call decides; vector.py makes one as it is imported."""
    global _kept_in
    if _kept_in is None:
        from numba.core import config

        _kept_in = Path(os.environ.get("NUMBA_CACHE_DIR") or own_folder(cache_dir or default_cache_dir()))
        setattr(config, "CACHE_DIR", str(_kept_in))  # noqa: B010  # numba makes its settings as it starts
    return _kept_in


def own_folder(cache_dir: Path) -> Path:
    """The folder of this version under the cache; those of others are removed. A temporary one where it cannot be written."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    kernels = cache_dir.expanduser().absolute() / "kernels"
    folder = kernels / digest.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for other in kernels.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
    except OSError:  # read-only: they are compiled again on every start
        folder = Path(tempfile.mkdtemp(prefix="ming-kernels-"))
    return folder
