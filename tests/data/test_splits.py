from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mars.data.splits import hold_out, split_instruments, spread


@settings(deadline=None)
@given(st.lists(st.text(max_size=8), unique=True, max_size=40))
def test_splits_are_by_instrument_and_stable(names):
    split = split_instruments(names)
    assert len(split) == len(names)
    assert split_instruments(names[::-1])[::-1] == split
    if len(names) > 1:
        assert {0, 1} <= set(split)
    # Others joining never moves an instrument, once both splits have one without help.
    more = [*names, "a", "b", "c"] if not {"a", "b", "c"} & set(names) else names
    alone = [split_instruments([name, *(str(i) for i in range(50))])[0] for name in more]
    joined = split_instruments([*more, *(f"{i}" for i in range(50) if f"{i}" not in more)])
    assert joined[: len(more)] == alone


def test_splits_have_the_sizes_asked_for():
    split = split_instruments([f"instrument {i}" for i in range(2000)])
    assert [round(split.count(i) / 2000, 2) for i in range(3)] == pytest.approx([0.8, 0.1, 0.1], abs=0.03)


def collection(instruments: int, each: int) -> tuple[list[str], list[str]]:
    """Names of notes, and the instrument of each."""
    pairs = [(f"{i}/{n}.wav", str(i)) for i in range(instruments) for n in range(each)]
    return [name for name, _ in pairs], [instrument for _, instrument in pairs]


@pytest.mark.parametrize(("instruments", "each", "held"), [(1, 30, 3), (2, 15, 3), (9, 10, 9), (1, 2, 1), (3, 1, 1)])
def test_of_few_instruments_a_tenth_of_the_notes_is_held_out(instruments, each, held):
    split, said = hold_out(*collection(instruments, each), None)
    assert [split.count(i) for i in range(3)] == [instruments * each - held, held, 0]
    assert said.startswith(f"{held} of {instruments * each} notes for validation, since")


def test_of_many_instruments_whole_ones_are_held_out():
    notes, instruments = collection(100, 3)
    split, said = hold_out(notes, instruments, None)
    assert split == [
        split_instruments(sorted(set(instruments)))[sorted(set(instruments)).index(i)] for i in instruments
    ]
    held = [len({i for i, s in zip(instruments, split, strict=True) if s == kind}) for kind in (1, 2)]
    assert said == f"{held[0]} instruments for validation and {held[1]} for tests, of 100"


def test_no_instrument_with_most_of_the_notes_is_held_out():
    names = [str(i) for i in range(20)]
    largest = names[split_instruments(names).index(1)]
    notes, instruments = collection(20, 3)
    notes += [f"{largest}/more{n}.wav" for n in range(200)]
    instruments += [largest] * 200
    split, said = hold_out(notes, instruments, None)
    assert split.count(1) == 26
    assert "since whole instruments would be more than a third" in said
    assert hold_out(notes, instruments, "instruments")[0].count(1) > 200  # it is done where it is asked for


def test_what_is_asked_for_is_done():
    few, many = collection(2, 15), collection(100, 3)
    assert set(hold_out(*few, "none")[0]) == {0}
    assert hold_out(*few, "instruments")[0].count(1) == 15
    assert [hold_out(*many, "notes")[0].count(i) for i in range(3)] == [270, 30, 0]
    assert hold_out(["a"], ["x"], None) == ([0], "nothing, since there is one note")
    assert hold_out(*collection(1, 5), "instruments")[1] == "nothing, since there is one instrument"


def test_the_order_of_the_notes_does_not_matter():
    notes, instruments = collection(2, 20)
    split, _ = hold_out(notes, instruments, None)
    assert hold_out(notes[::-1], instruments[::-1], None)[0] == split[::-1]


def test_some_of_a_split_are_evenly_spaced():
    notes = np.array([8, 9, 10])
    assert spread(notes, 2).tolist() == [8, 10]
    assert spread(notes, 99).tolist() == [8, 9, 10]
    assert spread(notes[:0], 99).tolist() == []
