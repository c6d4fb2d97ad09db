"""Notes to learn from: packed datasets, the built-in notes, and readers that pack other collections."""

from pathlib import Path

from mars.data import builtin
from mars.data.packed import COLUMNS, Dataset
from mars.data.splits import SPLITS
from mars.errors import DataError

__all__ = ["COLUMNS", "SPLITS", "DataError", "Dataset", "open_dataset"]


def open_dataset(path: str | Path | None) -> Dataset:
    """Return the packed dataset at `path`, or the built-in notes for None. Raises `DataError`."""
    return builtin.load() if path is None else Dataset.open(path)
