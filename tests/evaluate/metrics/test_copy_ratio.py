"""How much nearer notes are to what was learned than to what was held out."""

from __future__ import annotations

import math

import pytest
import torch

from mars.evaluate.mel import nearest
from mars.evaluate.metrics.copy_ratio import copy_ratio


def test_copy_ratio():
    train, test = torch.rand(60, 4, 30), torch.rand(60, 4, 30)
    both = torch.rand(1, 4, 30)
    queries = torch.cat([train[:1], test[:1], torch.rand(20, 4, 30), both])
    ratio = copy_ratio(
        nearest(queries, torch.cat([train, both])), nearest(queries, torch.cat([test, both]))
    )  # fmt: skip
    assert ratio[0] == 0
    assert ratio[1] == math.inf
    assert float(ratio[2:22].mean()) == pytest.approx(1, abs=0.05)
    assert ratio[22] == 1
    with pytest.raises(ValueError, match="want the same queries twice, got 23 and 2"):
        copy_ratio(nearest(queries, train), nearest(queries[:2], test))
