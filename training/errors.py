"""Training failures to explain to a person, in English and Chinese."""

from __future__ import annotations

from pathlib import Path

from ming_app.errors import MingError, UsageError


class RecipeError(UsageError):
    """A recipe file is missing, malformed, or asks for something impossible. Exit code 2."""


class DataError(MingError):
    """A training or evaluation file cannot be read, or nothing in it may be used."""


class TrainingError(MingError):
    """A run cannot go on: the loss is not finite, a checkpoint is damaged or belongs to another recipe."""


def not_written(path: Path, error: OSError) -> TrainingError:
    """The error for a file that could not be written (full disk, no permission)."""
    return TrainingError(f"{path} could not be written: {error.strerror}.", f"无法写入 {path}：{error.strerror}。")
