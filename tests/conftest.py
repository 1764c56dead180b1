"""Fixtures and rules shared by all tests.

`tests/real` needs the embedded weights (fetched into the app's cache on first use), `tests/browser` a Chromium; their
marks are set here by folder, so `-m "not real and not browser"` runs what needs neither. The development data beside
the checkout (`../shared`) is used where it is there and skipped with a reason where it is not.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ming_app.engine.backends.native import own_folder
from ming_app.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
KEPT_VARIABLES = ("MING_CACHE_DIR", "MING_WEIGHTS")  # where the weights are; every other setting is the test's own


def pytest_configure(config: pytest.Config) -> None:
    for name in [n for n in os.environ if n.startswith("MING_") and n not in KEPT_VARIABLES]:
        del os.environ[name]
    kept = tempfile.TemporaryDirectory(prefix="ming-tests-")  # nobody's real progress is touched
    config.add_cleanup(kept.cleanup)
    os.environ["XDG_DATA_HOME"] = kept.name
    # kernels are compiled once for all tests, whatever cache each of them has
    os.environ.setdefault("NUMBA_CACHE_DIR", str(own_folder(Settings.load().cache_dir)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folders = item.path.relative_to(ROOT).parts
        for mark in ("real", "browser"):
            if mark in folders:
                item.add_marker(mark)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The golden checkpoint with logits of the original implementation: base/, adapter/, expected.safetensors."""
    folder = SHARED / "golden" / "tiny_e4k2"
    if not folder.is_dir():
        pytest.skip("the golden checkpoint (../shared/golden/tiny_e4k2) is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def real_engine() -> Iterator:
    """The 0.5B model with its bundled adapter, in the backend and precision this machine would choose."""
    from ming_app.engine.engine import Engine
    from ming_app.settings import Settings

    engine = Engine.load(Settings.load({"model": "ming-moe-0.5b", "context": 2048}))
    yield engine
    engine.close()
