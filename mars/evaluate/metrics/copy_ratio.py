"""Copy ratio: how much nearer a note is to the notes that a model learned from than to others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mars.errors import ConfigError
from mars.evaluate import mel
from mars.evaluate.baselines import REAL_VS_REAL
from mars.evaluate.bootstrap import bootstrap_median
from mars.evaluate.extractor import Unavailable
from mars.evaluate.mel import Nearest
from mars.evaluate.metrics.measure import NO_TRAINING_NOTES, Measure, Metric, Row, figure
from mars.evaluate.report import Figure

MAY_BE_COPIES = ("", REAL_VS_REAL)  # rows


def copy_ratio(train: Nearest, test: Nearest) -> Tensor:
    """Return the distance to the nearest training note over that to the nearest test note, float64 (n,).

    About 1 for notes that are no nearer to what was learned than to what was held out; near 0 for copies. 1 where
    both distances are 0.

    Raises:
        ValueError: the two are not of the same queries.
    """
    if len(train.index) != len(test.index):
        raise ConfigError(f"copy_ratio: want the same queries twice, got {len(train.index)} and {len(test.index)}")
    ratio = (train.errors.mse / test.errors.mse).sqrt()
    return torch.where(train.errors.mse == test.errors.mse, torch.ones_like(ratio), ratio)


def _find(rows: Sequence[Row]) -> None:
    """Look for the training note nearest to each note of the rows, in one pass through the training notes."""
    rows = [row for row in rows if row.name in MAY_BE_COPIES]
    train = rows[0].train
    if train is None:
        return
    result = mel.nearest(torch.cat([row.fake.log_mel for row in rows]), train.log_mel_blocks())
    sizes = [len(row.fake) for row in rows]
    columns = (x.split(sizes) for x in (result.index, result.errors.mse, result.errors.mae))
    for row, index, mse, mae in zip(rows, *columns, strict=True):
        row.prepared["copy_ratio"] = Nearest(index, mel.MelErrors(mse, mae))


def _copy_ratio(row: Row) -> dict[str, Figure]:
    if "copy_ratio" not in row.prepared:
        raise Unavailable(NO_TRAINING_NOTES if row.train is None else "want notes that may be copies")
    ratio = copy_ratio(row.prepared["copy_ratio"], row.errors)
    details = {"below_half": float((ratio < 0.5).double().mean()), "lowest": float(ratio.min())}
    params = {"distance": "of log-mels", "value": "median", "n_train": len(row.train or ())}
    ratio = ratio.clamp(max=1000)  # infinite for a note that is a real one, bit for bit
    return {"copy_ratio": figure(bootstrap_median(ratio, seed=row.conditions.seed), params, details)}


MEASURES = (
    Measure(
        metrics=(Metric("copy_ratio", "copy ratio", +1, 160),),
        compute={"standard": _copy_ratio},
        modes=("generation",),
        training="needed",
        prepare=_find,
    ),
)
