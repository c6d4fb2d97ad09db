"""Runs are made of the same few notes as trainings."""

from tests.train.conftest import notes, smoke, wait

__all__ = ["notes", "smoke", "wait"]
