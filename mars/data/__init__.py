"""Notes to learn from: packed datasets, the built-in notes, and readers that pack other collections."""

from mars.data.packed import COLUMNS, Dataset, open_dataset
from mars.data.splits import SPLITS
from mars.errors import DataError

__all__ = ["COLUMNS", "SPLITS", "DataError", "Dataset", "open_dataset"]
