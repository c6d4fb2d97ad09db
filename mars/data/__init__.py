"""Notes to learn from: packed datasets, the built-in notes, and readers that pack other collections."""

from mars.data.notes import DataError
from mars.data.packed import COLUMNS, SPLITS, Dataset, open_dataset

__all__ = ["COLUMNS", "SPLITS", "DataError", "Dataset", "open_dataset"]
