"""What every test runs under: Triton interpreted where there is no GPU, a fixed seed, no readable garbage."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

settings.register_profile("mars", deadline=None, derandomize=True)
settings.load_profile("mars")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nan_filled_empty() -> Iterator[None]:
    """Fill `torch.empty` with NaN, so that memory read before it is written shows.

    Only without a GPU: on CUDA the mode that does it also refuses operations without a deterministic version.
    """
    torch.use_deterministic_algorithms(not GPU)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What commands keep does not go to the folder of whoever starts the tests."""
    before = os.environ.get("MARS_CACHE_DIR")
    os.environ["MARS_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("MARS_CACHE_DIR") if before is None else os.environ.update(MARS_CACHE_DIR=before)
