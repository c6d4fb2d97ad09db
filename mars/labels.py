"""The labels of a note: one table of them, how each is read and shown, and what a model can be asked for.

A label's value is what people say: a word ("brass") or a MIDI number; None where it is not known. A dataset keeps a
number for it, -1 where it is not known: of a word its place among the label's words, else the value itself. A model
tells classes apart, the last of which is the unknown.

An open label has no words of its own: its words are those of the dataset, and of the training notes those that a model
learns are stored with it (`Model.words`, `labels.json`). Words that are given for a label always go before those of the
table, so a dataset may have words of its own for `family` and `source` too. Labels that are not in the table are those
of somebody's dataset, as of another column of a CSV: `label` gives them, open like `instrument`, and they are asked
for together, as `labels`, where those of the table are arguments. A further label for everybody is one more entry of
`LABELS`: open, or with its words or levels; datasets that were packed before give -1 for it. Beside the entry, a field
of `Labels`, and where it may be asked for an argument of `Ranges.requested` and `Model.iterate` and an option of
`mars-generate`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict, cast

import numpy as np
import numpy.typing as npt

from mars.arguments import integer
from mars.errors import BadFileError, ConfigError
from mars.text import is_one_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Values = dict[str, Any]  # by the names of labels; None where unknown
Entry = Mapping[str, Any]  # what training notes that are alike hold; see `entries`
Words = Mapping[str, Sequence[str]]  # by the names of labels: words of a dataset or of a model
Columns = Mapping[str, npt.NDArray[np.int32]]  # by the names of labels: the numbers of notes, (N,)


class Condition(TypedDict, total=False):
    """What a note is to be or was asked to be; None, or no key at all, where that is left open or not known.

    Typed for who writes one down; the code goes by the names in `LABELS`, of which it has one key each, and a note of a
    model that was trained with further labels has these too.
    """

    family: str | None
    source: str | None
    pitch: int | None  # MIDI number; 60 is middle C
    velocity: int | None
    instrument: str | None


UNKNOWN = -1  # in a column
LONGEST_WORD = 1 << 14  # characters
_LISTED = 10  # words that a message names at most

FAMILIES = (
    "bass", "brass", "flute", "guitar", "keyboard", "mallet", "organ", "reed", "string", "synth_lead", "vocal",
)  # fmt: skip  # NSynth's instrument families, in its own order
SOURCES = ("acoustic", "electronic", "synthetic")
VELOCITIES = (25, 50, 75, 100, 127)  # NSynth's five; any other velocity counts as the nearest of them


@dataclass(frozen=True, slots=True)
class Label:
    """One label: with words, or a MIDI number with levels, or open (neither)."""

    name: str
    entry: str | None = None  # its key in NSynth's examples.json
    words: tuple[str, ...] = ()
    levels: tuple[int, ...] = ()  # that a model tells apart; any other number counts as the nearest of them

    @property
    def open(self) -> bool:
        """Whether its words are those of the dataset."""
        return not self.words and not self.levels

    def values(self, words: Words) -> Sequence[Any]:
        """Return the values that the numbers 0, 1, … of a column stand for."""
        return words.get(self.name) or self.words or (range(128) if self.levels else ())

    def classes(self, words: Words) -> Sequence[Any]:
        """Return the values that a model tells apart; its class for the unknown follows them."""
        return self.levels or self.values(words)

    def nearest(self, value: Any) -> Any:
        """Return the value nearest to `value` among those that a model tells apart."""
        return min(self.levels, key=lambda v: abs(v - value)) if self.levels else value

    def read(self, cell: str) -> str | int:
        """Return the number that a cell of a CSV means, or the word of an open label. Raises `ValueError`."""
        if cell in self.words:
            return self.words.index(cell)
        if not self.levels:
            if not (is_one_line(cell) and len(cell) <= LONGEST_WORD):
                raise ValueError(f"{self.name} {cell!r:.80} has characters that cannot be printed; rename it")
            return cell
        if self.name == "pitch":
            return pitch_of(cell)
        if not (cell.isascii() and cell.isdigit() and len(cell) <= 3 and int(cell) <= 127):
            raise ValueError(f"want {self.name} 0..127, got {cell!r}")
        return int(cell)

    def listed(self, value: Any) -> Any:
        """Parse a value in a listing of notes; None: it is none of the label's. Raises `ValueError` if malformed."""
        if value is None:
            return None
        if self.levels and not (type(value) is int and 0 <= value < 128):
            raise ValueError(f"want a {self.name} 0..127 or null, got {value!r:.40}")
        if not self.levels and not (isinstance(value, str) and is_one_line(value)):
            raise ValueError(f"want a name or null as {self.name}, got {value!r:.40}")
        return value


LABELS = {
    label.name: label
    for label in (
        Label("family", "instrument_family", words=FAMILIES),
        Label("source", "instrument_source", words=SOURCES),
        Label("pitch", "pitch", levels=tuple(range(128))),
        Label("velocity", "velocity", levels=VELOCITIES),
        Label("instrument", "instrument_str"),
    )
}
_OWN = re.compile(r"[^\W_][\w -]{0,63}")  # how a label of somebody's dataset may be named
CLOSED = tuple(name for name, label in LABELS.items() if not label.open)  # every condition has these
_STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}  # semitones above C
_SIGNS = {"": 0, "#": 1, "♯": 1, "b": -1, "♭": -1}
_PITCH = r"\d{1,3}|[A-Ga-g][#♯b♭]?-?\d"  # a MIDI number or the name of a note
_NAME = re.compile(rf"({'|'.join(FAMILIES)})_({'|'.join(SOURCES)})_(\d{{3}})-(\d{{3}})-(\d{{3}})")


@dataclass(frozen=True, slots=True)
class Labels:
    """What is known of a note besides its sound, as a dataset keeps it; `UNKNOWN` where nobody said.

    A family or source is a number of the table, or a word that is not in it.
    """

    instrument: str
    family: int | str = UNKNOWN
    source: int | str = UNKNOWN
    pitch: int = UNKNOWN
    velocity: int = UNKNOWN
    own: Mapping[str, str] = field(default_factory=dict)  # the words of labels that are not in the table

    @property
    def known(self) -> Values:
        """The values of those that are known."""
        values = {name: getattr(self, name) for name in LABELS} | dict(self.own)
        return {
            name: value if isinstance(value, str) else LABELS[name].values({})[value]
            for name, value in values.items()
            if value not in ("", UNKNOWN)
        }


def label(name: str) -> Label:
    """The label of that name: of the table, or else one of somebody's dataset, which is open."""
    return LABELS.get(name) or Label(name)


def is_name(name: str) -> bool:
    """Whether a label may have this name: one of the table, or letters, digits, spaces, _ and - (64 at most)."""
    return name in LABELS or _OWN.fullmatch(name) is not None


def pitch_of(text: str) -> int:
    """The MIDI number that a number or the name of a note means: 60 or C4 (middle C), A#3 or Bb3, C-1 to G9.

    Raises `ValueError` for anything else.
    """
    if re.fullmatch(_PITCH, text, re.ASCII):
        if text.isdigit():
            number = int(text)
        else:
            step, sign, octave = re.fullmatch(r"(.)(\D??)(-?\d)", text).groups()  # type: ignore[union-attr]
            number = 12 * (int(octave) + 1) + _STEPS[step.upper()] + _SIGNS[sign]
        if 0 <= number <= 127:
            return number
    raise ValueError(f"want pitch 0..127 or the name of a note such as C4 (60) or A#3, got {text!r:.40}")


def pitches_of(text: str) -> tuple[int, int]:
    """(lowest, highest) of one pitch or a rising range of them: 60, C4, 48-72 or C3-C5. Raises `ValueError`."""
    found = re.fullmatch(rf"({_PITCH})-({_PITCH})", text, re.ASCII)
    low, high = map(pitch_of, found.groups() if found else (text, text))
    if low > high:
        raise ValueError(f"want a range of pitches that rises, got {text!r:.40}")
    return low, high


def note_name(pitch: int) -> str:
    """The name of a MIDI number, with sharps: C4 for 60."""
    return f"{('C', 'C#', 'D', 'D#', 'E', 'F', 'F#', 'G', 'G#', 'A', 'A#', 'B')[pitch % 12]}{pitch // 12 - 1}"


def labels_of(name: str) -> Labels | None:
    """Parse the labels in an NSynth name like `bass_electronic_018-060-075`; None for any other name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    family, source, number, pitch, velocity = match.groups()
    if int(pitch) > 127 or int(velocity) > 127:
        return None
    return Labels(
        f"{family}_{source}_{number}", FAMILIES.index(family), SOURCES.index(source), int(pitch), int(velocity)
    )


def labels_in(entry: Mapping[str, Any]) -> Labels:
    """Read the labels in an entry of NSynth's examples.json. Raises `BadFileError`."""
    values: dict[str, Any] = {}
    for name, label in LABELS.items():
        if label.entry is None:
            continue
        value = entry.get(label.entry)
        if label.open:
            if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) < 256:
                raise BadFileError(f"examples.json: want a name for {label.entry}, got {value!r:.40}")
        elif type(value) is not int or not 0 <= value < len(label.values({})):  # a bool is no number here
            raise BadFileError(f"examples.json: want {label.entry} 0..{len(label.values({})) - 1}, got {value!r:.40}")
        elif label.words and entry.get(f"{label.entry}_str", label.words[value]) != label.words[value]:
            got = entry[f"{label.entry}_str"]
            raise BadFileError(f"examples.json: want {label.entry}_str {label.words[value]!r}, got {got!r:.40}")
        values[name] = value
    return Labels(**values)


def described(condition: Mapping[str, Any]) -> str:
    """Describe a condition in words: "acoustic brass, pitch 60, velocity 100"; empty where nothing is known."""
    kind = " ".join(condition[name] for name in ("source", "family") if condition.get(name) is not None)
    others = (f"{k} {v}" for k, v in condition.items() if v is not None and k not in ("source", "family"))
    return ", ".join(filter(None, (kind, *others)))


def vocabularies(attributes: Iterable[str], columns: Columns, words: Words) -> dict[str, list[str]]:
    """Return for each open condition the dataset's words that occur in the training notes: what a model learns."""
    return {
        name: [words[name][i] for i in np.unique(columns[name]) if i != UNKNOWN] for name in attributes if name in words
    }


def grown(attributes: Iterable[str], words: Words, new: Words) -> dict[str, list[str]]:
    """Return the words of a model with these conditions that learns more: first its own in their order, then the new.

    Args:
        words: of the model.
        new: of what it learns; see `vocabularies`.
    """
    found = {name: list(known) for name, known in words.items()}
    for name, learned in new.items():
        had = label(name).values(words) if name in attributes else ()
        more = [word for word in learned if word not in had]
        if more or name in words or label(name).open:
            found[name] = [*had, *more]
    return found


def sizes(attributes: Iterable[str], words: Words) -> dict[str, int]:
    """How many classes each condition of a model with these words has, without that of the unknown."""
    return {name: len(label(name).classes(words)) for name in attributes}


def condition_ids(
    conditions: Sequence[Mapping[str, Any]], attributes: Sequence[str], words: Words | None = None
) -> Tensor:
    """int64 (B, attributes): the class of each attribute, for a model with these words."""
    places = {name: _places(name, words or {}) for name in attributes}
    rows = [[places[name][c[name]] for name in attributes] for c in conditions]
    import torch

    return torch.tensor(rows, dtype=torch.int64).reshape(len(conditions), len(attributes))


def column_ids(columns: Columns, attributes: Sequence[str], of: Words, words: Words) -> Tensor:
    """Return int64 (N, attributes): the class of each attribute of the notes of a dataset.

    What the model has no word for is unknown to it.

    Args:
        of: the words of the dataset.
        words: those of the model.
    """
    import torch

    classes = []
    for name in attributes:
        kind, places = label(name), _places(name, words)
        table = [places.get(kind.nearest(value), places[None]) for value in kind.values(of)]
        numbers = columns.get(name, np.full(len(columns["family"]), UNKNOWN))
        classes.append(np.array([*table, places[None]], np.int64)[numbers])  # the last is that of -1
    return torch.from_numpy(np.stack(classes, axis=1) if classes else np.zeros((len(columns["family"]), 0), np.int64))


def _places(name: str, words: Words) -> dict[Any, int]:
    """Return the class of each value of a label, and of None."""
    return {value: i for i, value in enumerate((*label(name).classes(words), None))}


def entries(columns: Columns, attributes: Iterable[str], words: Words) -> list[dict[str, Any]]:
    """Summarise training notes for each family and source and, where they are conditions, each value of open labels.

    count; pitch: the 5th and 95th percentile; pitch_range: the lowest and the highest; velocity: the levels. Unknown
    pitches are -1.
    """
    names = ("family", "source", *(name for name in attributes if label(name).open))
    pitch, velocity = columns["pitch"], columns["velocity"]
    kinds, kind = np.unique(np.stack([columns[name] for name in names], axis=1), axis=0, return_inverse=True)
    result = []
    for k, numbers in enumerate(kinds.tolist()):
        matching = kind.reshape(-1) == k
        pitches = pitch[matching & (pitch >= 0)]
        low, high = np.percentile(pitches, (5, 95)).astype(int).tolist() if len(pitches) else (-1, -1)
        lowest, highest = (int(pitches.min()), int(pitches.max())) if len(pitches) else (-1, -1)
        values = (
            label(name).values(words)[number] if number >= 0 else None
            for name, number in zip(names, numbers, strict=True)
        )
        result.append(
            {
                **dict(zip(names, values, strict=True)),
                "count": int(matching.sum()),
                "pitch": [low, high],
                "pitch_range": [lowest, highest],
                "velocity": sorted({level(int(v)) for v in set(velocity[matching & (velocity >= 0)].tolist())}),
            }
        )
    return result


@dataclass(frozen=True)
class Ranges:
    """The labels that a model was trained with.

    attributes: those that are conditions of the model.
    notes: what its training notes hold; empty if that is not known, and then any label will do. Models that were
        trained before the lowest and highest pitch were noted know the range of the middle nine tenths alone.
    words: of its open conditions.
    """

    attributes: Sequence[str]
    notes: Sequence[Entry]
    words: Words = field(default_factory=dict)

    @property
    def opened(self) -> tuple[str, ...]:
        """The open labels that are conditions."""
        return tuple(name for name in self.attributes if label(name).open)

    @property
    def names(self) -> tuple[str, ...]:
        """The labels that a condition of a note of this model has: all but open ones that are none of its own."""
        return *CLOSED, *self.opened

    def takes(self, name: str, value: Any) -> bool:
        """Return whether the model has this condition and was trained on it; of a family or source: on this value."""
        if name not in self.attributes:
            return False
        if not self.notes:
            return not label(name).open or value in self.words.get(name, ())
        if label(name).levels:
            return any(_values(entry, name) for entry in self.notes)
        return value is not None and any(entry.get(name) == value for entry in self.notes)

    def holding(self, requested: Mapping[str, Any]) -> Sequence[Entry]:
        """Return the training notes that hold as much as can be of what is requested; a pitch is (lowest, highest)."""
        return self._narrowed({**dict.fromkeys(self.names), **requested})[0]

    def untrained(self, condition: Mapping[str, Any]) -> str | None:
        """Return the first label of a condition that no training note had together with those before it, or None.

        None too if the lowest and highest pitch are not known.
        """
        if any("pitch_range" not in entry for entry in self.notes):
            return None
        pitch = condition["pitch"]
        return self._narrowed({**condition, "pitch": None if pitch is None else (pitch, pitch)})[1]

    def requested(
        self,
        *,
        pitch: int | tuple[int, int] | None = None,
        family: str | None = None,
        source: str | None = None,
        velocity: int | None = None,
        instrument: str | None = None,
        labels: Mapping[str, str] | None = None,
        allow_untrained: bool = False,
    ) -> Values:
        """Check requested labels, and return them as `choose` takes them: pitch (lowest, highest), velocity a level.

        labels: the words of those that are not in the table, by name.
        allow_untrained: take a pitch or a velocity that was out of the range of the training notes, and labels that
            occurred in them, but never together.

        Raises:
            ConfigError: a label is no condition of the model, out of range, or not one that it was trained on.
        """
        given: dict[str, Any] = {
            "pitch": pitch, "family": family, "source": source, "velocity": velocity, "instrument": instrument,
        }  # fmt: skip
        if labels is not None and not isinstance(labels, Mapping):
            raise ConfigError(f"labels must be words by the names of labels, got {labels!r:.80}")
        if taken := [name for name in labels or () if name in given]:
            raise ConfigError(f"labels: {taken[0]} is an argument of its own; give it as `{taken[0]}`")
        given |= labels or {}
        for name, value in given.items():
            if value is not None and name not in self.attributes:
                raise ConfigError(
                    f"{name} {value}: the model was not trained with {name} as a condition "
                    f"(it has {', '.join(self.attributes) or 'none'}); leave it out"
                )
            if value is not None and not label(name).levels:
                self._check_word(name, value)
        condition: Values = {name: None if given.get(name) is None else str(given[name]) for name in self.names}
        condition["pitch"] = None if pitch is None else _limits(pitch)
        condition["velocity"] = None if velocity is None else level(_midi("velocity", velocity))
        for name, value in (("pitch", pitch), ("velocity", velocity)):
            if value is not None and not self.takes(name, value):
                raise ConfigError(f"{name} {value}: the model was trained on notes of unknown {name}; leave it out")
        if not allow_untrained:
            self._check(condition)
        return condition

    def accepted(self, condition: Mapping[str, Any], *, allow_untrained: bool = False) -> Condition:
        """Return a condition as a note of this model has it: all of `names`, None where it says nothing.

        Attributes that are no condition of the model become None, and a velocity the nearest of VELOCITIES.

        Raises:
            ConfigError: a value is out of range, or the model was not trained on it; see `requested`.
        """
        if not isinstance(condition, Mapping):
            raise ConfigError(f"want a mapping of {', '.join(LABELS)} as condition, got {condition!r:.80}")
        known = dict.fromkeys((*LABELS, *self.opened))
        if unknown := condition.keys() - known.keys():
            names = ", ".join(sorted(map(str, unknown)))
            raise ConfigError(f"{condition}: want {', '.join(known)} in a condition, got {names}")
        kept = {name: condition.get(name) if name in self.attributes else None for name in self.names}
        try:
            if kept["pitch"] is not None:
                kept["pitch"] = _midi("pitch", kept["pitch"])
            requested = self.requested(**arguments(kept), allow_untrained=allow_untrained)
            return cast(Condition, requested | {"pitch": kept["pitch"]})
        except ConfigError as error:
            raise ConfigError(f"{condition}: {error}") from None

    def choose(self, requested: Values, generator: torch.Generator) -> Condition:
        """Draw the condition of one note; always takes three random numbers, and a fourth with open labels.

        What is left open is one of the families, the source most common in it, any of their instruments where that is
        a condition, one of its usual pitches and any of its velocities, among the notes that hold what is asked for if
        there are any.
        """
        import torch

        draws = torch.rand(4 if self.opened else 3, generator=generator, dtype=torch.float32).tolist()
        family, source, pitch, velocity = (requested[name] for name in CLOSED)
        entry: Entry | None = None
        if self.notes:
            matching, _ = self._narrowed(requested)
            families = label("family").values(self.words)
            known = sorted({e["family"] for e in matching if e["family"]}, key=families.index) or [None]
            family = family or _pick(known, draws[0])
            entry = self._one_of([e for e in matching if e["family"] == family], draws[-1])
            source = source or (entry and entry["source"])
            for usual in (_span(*entry["pitch"]), _values(entry, "pitch")) if entry else ():
                within = usual if pitch is None else _overlap(usual, pitch)
                if within:
                    pitch = within[0], within[-1]
                    break
            levels = _values(entry, "velocity") if entry else VELOCITIES
            velocity = velocity or (_pick(levels, draws[2]) if levels else None)
        if pitch is not None:
            pitch = _pick(range(pitch[0], pitch[1] + 1), draws[1])
        chosen = {"family": family, "source": source, "pitch": pitch, "velocity": velocity}
        for name in self.opened:
            value = requested[name]
            chosen[name] = entry.get(name) if value is None and entry is not None else value
        kept = {name: value if name in self.attributes else None for name, value in chosen.items()}
        return cast(Condition, kept)

    def _one_of(self, matching: Sequence[Entry], uniform: float) -> Entry | None:
        """Return one of a family's entries with its most common source; with open labels several have that source."""
        counts: dict[str | None, int] = {}
        for entry in matching:
            counts[entry["source"]] = counts.get(entry["source"], 0) + entry["count"]
        common = max(counts, key=lambda source: counts[source], default=None)
        return _pick([e for e in matching if e["source"] == common], uniform) if matching else None

    def _check_word(self, name: str, value: Any) -> None:
        """Raise an error if the model does not know the word, or was trained on no note with it."""
        known, trained = label(name).values(self.words), {entry.get(name) for entry in self.notes}
        if value not in known:
            near = difflib.get_close_matches(str(value), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {some(known)}"
            raise ConfigError(f"unknown {name} {value!r:.80}; {hint}")
        if self.notes and value not in trained:
            others = some([word for word in known if word in trained])
            raise ConfigError(f"{name} {value}: the model was trained on none; it knows {others or 'no other'}")

    def _narrowed(self, requested: Values) -> tuple[Sequence[Entry], str | None]:
        """Return the training notes that match as many requested labels as can be, and the first that none has."""
        matching, missing = self.notes, None
        for name in ("family", "source", *self.opened, "pitch", "velocity"):
            if requested[name] is not None:
                holding = [e for e in matching if _holds(e, name, requested[name])]
                missing = missing if holding or missing else name
                matching = holding or matching
        return matching, missing

    def _check(self, requested: Values) -> None:
        """Raise an error if no training notes hold all that is asked for."""
        matching, name = self._narrowed(requested)
        if not self.notes or name is None:
            return
        low, high = requested["pitch"] or (None, None)
        value = requested[name] if name != "pitch" else f"{low}-{high}" if low != high else low
        of = " ".join(
            requested[k] for k in ("source", "family", *self.opened) if requested[k] is not None and k != name
        )
        values = sorted({v for e in matching for v in _values(e, name)})
        trained = f"{values[0]}-{values[-1]}" if name == "pitch" else some(values)
        raise ConfigError(
            f"{name} {value}: the notes{of and f' ({of})'} that the model was trained on are known to have {trained}; "
            "ask for one of these, or set `allow_untrained` and expect other notes than asked for"
        )


def arguments(condition: Values) -> dict[str, Any]:
    """Return a condition as `Ranges.requested` and `Model.iterate` take it: the labels of the table, and `labels`."""
    own = {name: value for name, value in condition.items() if name not in LABELS and value is not None}
    return {**{name: value for name, value in condition.items() if name in LABELS}, "labels": own or None}


def _values(entry: Entry, name: str) -> Sequence[Any]:
    """Return the known values of label `name` of the notes of an entry."""
    if name == "pitch":
        return _span(*entry.get("pitch_range", entry["pitch"]))
    if name == "velocity":
        return tuple(entry.get("velocity", VELOCITIES))
    return () if entry.get(name) is None else (entry[name],)


def _holds(entry: Entry, name: str, value: Any) -> bool:
    """Return whether notes of an entry have this value of label `name`; of a range of pitches, any of it."""
    values = _values(entry, name)
    return bool(_overlap(values, value)) if name == "pitch" else value in values


def _span(low: int, high: int) -> range:
    """Return all from low to high; none where they are not known (-1)."""
    return range(low, high + 1) if low >= 0 else range(0)


def _overlap(pitches: Sequence[int], limits: tuple[int, int]) -> range:
    return range(max(pitches[0], limits[0]), min(pitches[-1], limits[1]) + 1) if pitches else range(0)


def _limits(pitch: int | tuple[int, int]) -> tuple[int, int]:
    """Return (lowest, highest) of a pitch or of a range of them."""
    if isinstance(pitch, tuple | list):
        if len(pitch) == 2 and _midi("pitch", pitch[0]) <= _midi("pitch", pitch[1]):
            return _midi("pitch", pitch[0]), _midi("pitch", pitch[1])
        raise ConfigError(f"pitch must be a MIDI number 0..127 or a rising range of them (60 is middle C), got {pitch}")
    number = _midi("pitch", pitch)
    return number, number


def _midi(name: str, value: Any) -> int:
    return integer(f"{name}{' (a MIDI number; 60 is middle C)' if name == 'pitch' else ''}", value, 0, 127)


def level(velocity: int) -> int:
    """Return the velocity of VELOCITIES that is nearest."""
    return int(LABELS["velocity"].nearest(velocity))


def some(words: Sequence[Any]) -> str:
    """List values for a message, the first few and how many more there are."""
    more = f" and {len(words) - _LISTED:,} more" if len(words) > _LISTED else ""
    return ", ".join(map(str, words[:_LISTED])) + more


def _pick(items: Sequence[Any], uniform: float) -> Any:
    """Return the item at `uniform` in [0, 1)."""
    return items[min(int(uniform * len(items)), len(items) - 1)]
