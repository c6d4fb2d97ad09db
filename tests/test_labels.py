"""Labels: what a model can be asked for, what it was not trained on, and what a note is chosen to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mars.errors import BadFileError, ConfigError
from mars.labels import (
    FAMILIES,
    LABELS,
    VELOCITIES,
    Ranges,
    column_ids,
    condition_ids,
    described,
    entries,
    labels_in,
    labels_of,
    note_name,
    pitch_of,
    pitches_of,
    sizes,
    vocabularies,
)

ALL = ("family", "source", "pitch", "velocity")
NOTES = [  # of a model whose lowest and highest pitches are not known
    {"family": "brass", "source": "acoustic", "count": 8, "pitch": [42, 70]},
    {"family": "brass", "source": "synthetic", "count": 9, "pitch": [40, 78]},
    {"family": "flute", "source": "acoustic", "count": 16, "pitch": [58, 83]},
]
EXACT = [
    {**NOTES[0], "pitch_range": [30, 90], "velocity": [50, 127]},
    {**NOTES[1], "pitch_range": [40, 80], "velocity": [100]},
    {**NOTES[2], "pitch_range": [50, 95], "velocity": []},
]
UNLABELLED = [{"family": None, "source": None, "count": 3, "pitch": [-1, -1], "pitch_range": [-1, -1], "velocity": []}]


def drawn(requested, attributes=ALL, notes=NOTES, count=200):
    requested = {"family": None, "source": None, "pitch": None, "velocity": None, **requested}
    return [Ranges(attributes, notes).choose(requested, torch.Generator().manual_seed(i)) for i in range(count)]


def test_conditions_are_drawn_from_what_was_trained_on():
    found = drawn({})
    assert {(c["family"], c["source"]) for c in found} == {("brass", "synthetic"), ("flute", "acoustic")}
    assert {c["velocity"] for c in found} == set(VELOCITIES)
    brass = [c["pitch"] for c in found if c["family"] == "brass"]
    assert 60 < len(brass) < 140
    assert min(brass) in (40, 41, 42)
    assert max(brass) in (76, 77, 78)


def test_what_is_asked_for_is_kept():
    found = drawn({"source": "acoustic", "pitch": (50, 64), "velocity": 75})
    assert {c["family"] for c in found} == {"brass", "flute"}
    assert {(c["source"], c["velocity"]) for c in found} == {("acoustic", 75)}
    assert {c["pitch"] for c in found if c["family"] == "flute"} == set(range(58, 65))
    assert {c["pitch"] for c in found if c["family"] == "brass"} == set(range(50, 65))


def test_a_range_outside_the_trained_one_is_taken_as_it_is():
    assert {c["pitch"] for c in drawn({"pitch": (100, 102)})} == {100, 101, 102}


def test_a_source_that_the_family_lacks_is_taken_as_it_is():
    found = drawn({"family": "flute", "source": "synthetic"})
    assert {(c["family"], c["source"]) for c in found} == {("flute", "synthetic")}
    assert all(58 <= c["pitch"] <= 83 for c in found)


def test_what_is_not_known_is_left_open():
    nothing = {"family": None, "source": None, "pitch": None, "velocity": None}
    assert drawn({}, notes=[], count=1) == [nothing]
    assert drawn({"pitch": (60, 60)}, notes=[], count=1) == [{**nothing, "pitch": 60}]
    (c,) = drawn({}, attributes=("pitch",), count=1)
    assert c == {**nothing, "pitch": c["pitch"]}
    unlabelled = [{"family": None, "source": None, "count": 3, "pitch": [-1, -1]}]
    (c,) = drawn({}, notes=unlabelled, count=1)
    assert c == {**nothing, "velocity": c["velocity"]}


def test_condition_ids():
    c = {"family": "flute", "source": None, "pitch": 60, "velocity": 127}
    assert condition_ids([c], ("velocity", "source", "family", "pitch")).tolist() == [
        [4, 3, FAMILIES.index("flute"), 60]
    ]
    assert condition_ids([c, c], ()).shape == (2, 0)


def test_families_that_never_had_the_pitch_are_not_drawn():
    assert {c["family"] for c in drawn({"pitch": (45, 50)})} == {"brass"}
    found = drawn({"pitch": (93, 99)}, notes=EXACT)
    assert {(c["family"], c["source"]) for c in found} == {("flute", "acoustic")}
    assert {c["pitch"] for c in found} == {93, 94, 95}
    assert {c["source"] for c in drawn({"family": "brass", "pitch": (85, 99)}, notes=EXACT)} == {"acoustic"}


def test_velocities_are_those_trained_on():
    velocities = {(c["family"], c["velocity"]) for c in drawn({}, notes=EXACT)}
    assert velocities == {("brass", 100), ("flute", None)}
    assert {c["source"] for c in drawn({"velocity": 50}, notes=EXACT)} == {"acoustic"}
    assert drawn({}, notes=UNLABELLED, count=1) == [dict.fromkeys(ALL)]


def test_what_can_be_asked_for():
    ranges = Ranges(ALL, NOTES)
    assert ranges.takes("family", "flute")
    assert not ranges.takes("family", "vocal")
    assert not ranges.takes("source", "electronic")
    assert ranges.takes("pitch", 3)
    assert ranges.takes("velocity", 1)
    assert Ranges(ALL, []).takes("family", "vocal")
    assert not Ranges(("family",), []).takes("pitch", 60)
    assert not any(Ranges(ALL, UNLABELLED).takes(name, 60) for name in ("pitch", "velocity"))


@pytest.mark.parametrize(
    ("notes", "requested", "message"),
    [
        (NOTES, {"pitch": 5}, r"pitch 5: the notes that the model was trained on are known to have 40-83; ask for one"),
        (NOTES, {"pitch": (100, 110)}, "pitch 100-110"),
        (NOTES, {"pitch": 50, "family": "flute"}, r"the notes \(flute\) .* are known to have 58-83"),
        (NOTES, {"pitch": 75, "family": "brass", "source": "acoustic"}, r"\(acoustic brass\) .* known to have 42-70"),
        (NOTES, {"source": "synthetic", "family": "flute"}, r"source synthetic: .*\(flute\) .* known to have acoustic"),
        (EXACT, {"velocity": 25}, "velocity 25: .* known to have 50, 100, 127"),
        (EXACT, {"pitch": 96}, "known to have 30-95"),
        (EXACT, {"pitch": 92, "velocity": 50}, "velocity 50: .* known to have"),
    ],
)
def test_what_was_not_trained_on_has_to_be_allowed(notes, requested, message):
    ranges = Ranges(ALL, notes)
    with pytest.raises(ConfigError, match=message):
        ranges.requested(**requested)
    allowed = ranges.requested(**requested, allow_untrained=True)
    chosen = ranges.choose(allowed, torch.Generator().manual_seed(0))
    for name, value in requested.items():
        low, high = value if isinstance(value, tuple) else (value, value)
        assert low <= chosen[name] <= high
    if not isinstance(requested.get("pitch"), tuple):
        with pytest.raises(ConfigError, match="set `allow_untrained`"):
            ranges.accepted(requested)
        assert ranges.accepted(requested, allow_untrained=True) == dict.fromkeys(ALL) | requested


def test_what_no_training_note_had():
    exact = Ranges(ALL, EXACT)
    known = {"family": "brass", "source": "acoustic", "pitch": 30, "velocity": 50}
    for condition, name in (
        (known, None),
        ({**known, "pitch": 29}, "pitch"),
        ({**known, "source": "synthetic"}, "pitch"),
        ({**known, "velocity": 100}, "velocity"),
        ({**known, "family": None, "pitch": 96, "velocity": None}, "pitch"),
        (dict.fromkeys(ALL), None),
    ):
        assert exact.untrained(condition) == name
        assert Ranges(ALL, NOTES).untrained(condition) is None


@pytest.mark.parametrize("name", ["pitch", "velocity"])
def test_labels_that_no_training_note_had_cannot_be_allowed(name):
    for call in (Ranges(ALL, UNLABELLED).requested, lambda **c: Ranges(ALL, UNLABELLED).accepted(c)):
        with pytest.raises(ConfigError, match=f"{name} 60: the model was trained on notes of unknown {name}"):
            call(**{name: 60})
    with pytest.raises(ConfigError, match="unknown"):
        Ranges(ALL, UNLABELLED).requested(**{name: 60}, allow_untrained=True)


def test_numbers_of_numpy_are_numbers():
    ranges = Ranges(ALL, NOTES)
    requested = ranges.requested(pitch=np.int64(60), velocity=np.uint8(110))
    assert requested == {"family": None, "source": None, "pitch": (60, 60), "velocity": 100}
    assert type(requested["pitch"][0]) is int
    accepted = ranges.accepted({"pitch": np.int32(60), "family": np.str_("flute")})
    assert {type(value) for value in accepted.values()} == {int, str, type(None)}
    assert ranges.requested(pitch=[50, np.int8(60)])["pitch"] == (50, 60)


@pytest.mark.parametrize(
    "pitch", [60.5, "60", float("nan"), (60,), (50, 60, 70), (60.5, 70), np.array([50, 60]), -1, 128]
)
def test_pitches_that_are_none(pitch):
    with pytest.raises(ConfigError, match=r"pitch .*must be"):
        Ranges(ALL, NOTES).requested(pitch=pitch)


HORN, FLUTES = "Horn in F", ("flute a", "flute b")
OPEN = (*ALL, "instrument")
WORDS = {"instrument": [HORN, *FLUTES, "never trained on"]}
OWN = [
    {**EXACT[0], "instrument": HORN},
    {**EXACT[2], "count": 1, "pitch_range": [50, 60], "pitch": [52, 58], "instrument": FLUTES[0]},
    {**EXACT[2], "count": 9, "pitch_range": [70, 95], "pitch": [72, 90], "instrument": FLUTES[1]},
    {**EXACT[1], "count": 3, "instrument": None},
]


def test_a_model_with_instruments_draws_them_too():
    ranges = Ranges(OPEN, OWN, WORDS)
    requested = ranges.requested()
    assert list(requested) == list(ranges.names) == list(OPEN)
    found = [ranges.choose(requested, torch.Generator().manual_seed(i)) for i in range(200)]
    assert {(c["family"], c["instrument"]) for c in found} == {("brass", HORN), *(("flute", f) for f in FLUTES)}
    assert {c["pitch"] for c in found if c["instrument"] == FLUTES[0]} <= set(range(52, 59))
    assert {c["pitch"] for c in found if c["instrument"] == FLUTES[1]} <= set(range(72, 91))
    requested = ranges.requested(instrument=HORN)
    for i in range(20):
        c = ranges.choose(requested, torch.Generator().manual_seed(i))
        assert (c["family"], c["source"], c["instrument"]) == ("brass", "acoustic", HORN)


def test_models_without_instruments_choose_as_ever():
    requested = {**dict.fromkeys(ALL), "instrument": None}
    generator = torch.Generator().manual_seed(3)
    chosen = Ranges(ALL, NOTES).choose(requested, generator)
    assert list(chosen) == list(ALL)
    same = torch.Generator().manual_seed(3)
    torch.rand(3, generator=same)
    assert torch.equal(torch.rand(4, generator=generator), torch.rand(4, generator=same))


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ({"instrument": "Horn in G"}, "unknown instrument 'Horn in G'; did you mean Horn in F"),
        ({"instrument": "zzz"}, "unknown instrument 'zzz'; known: Horn in F, flute a, flute b, never trained on"),
        ({"instrument": "never trained on"}, "was trained on none; it knows Horn in F, flute a, flute b$"),
        ({"instrument": HORN, "family": "flute"}, r"instrument Horn in F: the notes \(flute\) .* flute a, flute b;"),
        ({"instrument": FLUTES[0], "pitch": 80}, r"pitch 80: the notes \(flute a\) .* known to have 50-60"),
        ({"instrument": 3}, "unknown instrument 3"),
    ],
)
def test_instruments_that_a_model_does_not_know(requested, message):
    with pytest.raises(ConfigError, match=message):
        Ranges(OPEN, OWN, WORDS).requested(**requested)


def test_instruments_are_refused_by_models_without_them():
    with pytest.raises(
        ConfigError, match=r"not trained with instrument as a condition \(it has family, source, pitch,"
    ):
        Ranges(ALL, NOTES).requested(instrument=HORN)
    assert not Ranges(ALL, NOTES).takes("instrument", HORN)
    assert Ranges(ALL, NOTES).accepted({"instrument": HORN}) == dict.fromkeys(ALL)
    assert Ranges(OPEN, [], WORDS).takes("instrument", HORN)
    assert not Ranges(OPEN, [], WORDS).takes("instrument", "kazoo")
    assert Ranges(OPEN, OWN, WORDS).takes("instrument", HORN)
    assert not Ranges(OPEN, OWN, WORDS).takes("instrument", "never trained on")


def test_a_message_names_a_few_of_many_words():
    words = {"instrument": [f"x{i}" for i in range(1006)]}
    with pytest.raises(ConfigError, match=r"known: x0, .*, x9 and 996 more$"):
        Ranges(OPEN, [], words).requested(instrument="piano")


def columns(**values):
    size = len(next(iter(values.values())))
    return {name: np.array(values.get(name, [-1] * size), np.int32) for name in LABELS}


def test_classes_of_columns_and_of_conditions_agree():
    words = {"instrument": ["a", "b", "c"]}
    notes = columns(
        family=[0, -1, 10], source=[2, 0, -1], pitch=[127, 0, -1], velocity=[0, 38, 114], instrument=[2, 0, 1]
    )
    learnt_words = {"instrument": ["a", "c"]}
    ids = column_ids(notes, OPEN, words, learnt_words)
    assert ids.tolist() == [[0, 2, 127, 0, 1], [11, 0, 0, 1, 0], [10, 3, 128, 4, 2]]
    conditions = [
        {"family": "bass", "source": "synthetic", "pitch": 127, "velocity": 25, "instrument": "c"},
        {"family": None, "source": "acoustic", "pitch": 0, "velocity": 50, "instrument": "a"},
        {"family": "vocal", "source": None, "pitch": None, "velocity": 127, "instrument": None},
    ]
    assert torch.equal(condition_ids(conditions, OPEN, learnt_words), ids)
    assert sizes(OPEN, learnt_words) == {"family": 11, "source": 3, "pitch": 128, "velocity": 5, "instrument": 2}


def test_a_model_learns_the_words_of_its_training_notes():
    words = {"instrument": ["a", "b", "c"]}
    notes = columns(instrument=[2, 0, 2], family=[0, 0, 0], pitch=[50, 40, 60])
    assert vocabularies(ALL, notes, words) == {}
    assert vocabularies(OPEN, notes, words) == {"instrument": ["a", "c"]}
    (entry,) = entries(notes, ALL, words)
    assert "instrument" not in entry
    found = entries(notes, OPEN, words)
    assert [(e["family"], e["instrument"], e["count"], e["pitch_range"]) for e in found] == [
        ("bass", "a", 1, [40, 40]),
        ("bass", "c", 2, [50, 60]),
    ]


def test_words_of_a_dataset_go_before_those_of_the_table():
    words = {"family": ["ney", "oud"]}
    notes = columns(family=[1, 0, -1])
    assert column_ids(notes, ("family",), words, words).flatten().tolist() == [1, 0, 2]
    assert [e["family"] for e in entries(notes, (), words)] == [None, "ney", "oud"]
    assert Ranges(("family",), entries(notes, (), words), words).requested(family="oud")["family"] == "oud"


def test_what_a_note_is_in_words():
    c = {"family": "brass", "source": "acoustic", "pitch": 60, "velocity": 100}
    assert described(c) == "acoustic brass, pitch 60, velocity 100"
    assert (
        described({**c, "source": None, "velocity": None, "instrument": HORN})
        == "brass, pitch 60, instrument Horn in F"
    )
    assert described(dict.fromkeys(OPEN)) == ""


@pytest.mark.parametrize(
    ("name", "cell", "number"),
    [
        ("family", "brass", 1),
        ("source", "synthetic", 2),
        ("pitch", "060", 60),
        ("pitch", "A#3", 58),
        ("instrument", HORN, HORN),
    ],
)
def test_cells_are_read(name, cell, number):
    assert LABELS[name].read(cell) == number


@pytest.mark.parametrize(
    ("name", "cell", "message"),
    [
        ("family", "ka\x1bzoo", "family .* has characters that cannot be printed"),
        ("velocity", "128", "want velocity 0..127, got '128'"),
        ("pitch", "\u0664", "want pitch 0..127"),
        ("instrument", "a\x1bb", "instrument .* has characters that cannot be printed"),
    ],
)
def test_senseless_cells_are_explained(name, cell, message):
    with pytest.raises(ValueError, match=message):
        LABELS[name].read(cell)


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("127", 127), ("C4", 60), ("c4", 60), ("Bb3", 58), ("b3", 59), ("E♭2", 39), ("F♯2", 42), ("C-1", 0),
     ("G9", 127), ("Cb4", 59)],
)  # fmt: skip
def test_pitches_are_numbers_or_names_of_notes(text, number):
    assert pitch_of(text) == number
    assert pitch_of(note_name(number)) == number


@pytest.mark.parametrize(
    ("text", "limits"),
    [("60", (60, 60)), ("48-72", (48, 72)), ("C3-C5", (48, 72)), ("C-1-C4", (0, 60)), ("c-1-b-1", (0, 11))],
)
def test_ranges_of_pitches(text, limits):
    assert pitches_of(text) == limits


@pytest.mark.parametrize("text", ["", "C", "H3", "G#9", "C-2", "C10", "128", "-1", "1e1", "C4-", "²", "C5-C3"])
def test_what_is_no_pitch_is_told(text):
    with pytest.raises(ValueError, match="want"):
        pitches_of(text)


def test_the_labels_of_a_name_and_of_its_entry_agree():
    labels = labels_of("flute_acoustic_002-072-100")
    entry = {
        "instrument_str": "flute_acoustic_002", "instrument_family": FAMILIES.index("flute"), "instrument_source": 0,
        "pitch": 72, "velocity": 100,
    }  # fmt: skip
    assert labels == labels_in(entry)
    assert labels.known == {
        "family": "flute", "source": "acoustic", "pitch": 72, "velocity": 100, "instrument": "flute_acoustic_002",
    }  # fmt: skip
    with pytest.raises(BadFileError, match="want instrument_family_str 'flute', got 'reed'"):
        labels_in(entry | {"instrument_family_str": "reed"})
