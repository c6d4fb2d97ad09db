"""The labels of a note (family, source, pitch, velocity) and which of them a model can be asked for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mars.arguments import integer
from mars.config import CLASSES, FAMILIES, SOURCES, VELOCITIES
from mars.errors import ConfigError

Condition = dict[str, Any]  # family, source: name; pitch, velocity: int; None where unknown
Entry = Mapping[str, Any]  # what the training notes of one family and source hold; see `mars.train.var.ranges`


@dataclass(frozen=True)
class Ranges:
    """The labels that a model was trained with.

    attributes: those that are conditions of the model.
    notes: what its training notes hold; empty if that is not known, and then any label will do. Models that were
        trained before the lowest and highest pitch were noted know the range of the middle nine tenths alone.
    """

    attributes: Sequence[str]
    notes: Sequence[Entry]

    def takes(self, name: str, value: Any) -> bool:
        """Whether the model has the condition and was trained on some: of a family or source, on this one."""
        if name not in self.attributes or not self.notes:
            return name in self.attributes
        known = [v for entry in self.notes for v in _values(entry, name)]
        return bool(known) if name in ("pitch", "velocity") else value in known

    def untrained(self, condition: Condition) -> str | None:
        """The first label of a condition that no training note had together with those before it; None if all had.

        None too if the lowest and highest pitch are not known.
        """
        if any("pitch_range" not in entry for entry in self.notes):
            return None
        pitch = condition["pitch"]
        return self._narrowed({**condition, "pitch": None if pitch is None else (pitch, pitch)})[1]

    def asked(
        self,
        *,
        pitch: int | tuple[int, int] | None = None,
        family: str | None = None,
        source: str | None = None,
        velocity: int | None = None,
        allow_untrained: bool = False,
    ) -> Condition:
        """What a caller wants, checked, as `choose` takes it: the pitch as (lowest, highest), the velocity as a level.

        allow_untrained: take a pitch or a velocity that was out of the range of the training notes, and labels that
            occurred in them, but never together.

        Raises:
            ConfigError: a label is no condition of the model, out of range, or not one that it was trained on.
        """
        given = {"pitch": pitch, "family": family, "source": source, "velocity": velocity}
        for name, value in given.items():
            if value is not None and name not in self.attributes:
                raise ConfigError(
                    f"{name} {value}: the model was not trained with {name} as a condition "
                    f"(it has {', '.join(self.attributes) or 'none'}); leave it out"
                )
        for name, value, known in (("family", family, FAMILIES), ("source", source, SOURCES)):
            trained = [k for k in known if any(e[name] == k for e in self.notes)]
            if value is not None and value not in known:
                near = difflib.get_close_matches(str(value), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
                raise ConfigError(f"unknown {name} {value!r}; {hint}")
            if value is not None and self.notes and value not in trained:
                raise ConfigError(
                    f"{name} {value}: the model was trained on none; it knows {', '.join(trained) or 'no other'}"
                )
        limits = None if pitch is None else _limits(pitch)
        wanted = {
            "family": None if family is None else str(family),
            "source": None if source is None else str(source),
            "pitch": limits,
            "velocity": None if velocity is None else level(_midi("velocity", velocity)),
        }
        for name, value in (("pitch", pitch), ("velocity", velocity)):
            if value is not None and not self.takes(name, value):
                raise ConfigError(f"{name} {value}: the model was trained on notes of unknown {name}; leave it out")
        if not allow_untrained:
            self._check(wanted)
        return wanted

    def accepted(self, condition: Condition, *, allow_untrained: bool = False) -> Condition:
        """A condition as a note of this model has it: all four attributes, None where it says nothing.

        Attributes that are no condition of the model become None, and a velocity the nearest of VELOCITIES.

        Raises:
            ConfigError: a value is out of range, or the model was not trained on it; see `asked`.
        """
        if not isinstance(condition, Mapping):
            raise ConfigError(f"want a mapping of {', '.join(CLASSES)} as condition, got {condition!r:.80}")
        if unknown := condition.keys() - CLASSES.keys():
            names = ", ".join(sorted(map(str, unknown)))
            raise ConfigError(f"{condition}: want {', '.join(CLASSES)} in a condition, got {names}")
        kept = {name: condition.get(name) if name in self.attributes else None for name in CLASSES}
        try:
            if kept["pitch"] is not None:
                kept["pitch"] = _midi("pitch", kept["pitch"])
            return self.asked(**kept, allow_untrained=allow_untrained) | {"pitch": kept["pitch"]}
        except ConfigError as error:
            raise ConfigError(f"{condition}: {error}") from None

    def choose(self, asked: Condition, generator: torch.Generator) -> Condition:
        """The condition of one note; draws three numbers, whatever is asked.

        What is left open is one of the families, the source most common in it, one of its usual pitches and any of its
        velocities, among the notes that hold what is asked for if there are any.
        """
        draws = torch.rand(3, generator=generator, dtype=torch.float32).tolist()
        family, source, pitch, velocity = (asked[name] for name in ("family", "source", "pitch", "velocity"))
        if self.notes:
            alike, _ = self._narrowed(asked)
            known = sorted({e["family"] for e in alike if e["family"]}, key=FAMILIES.index) or [None]
            family = family or _pick(known, draws[0])
            entry = max((e for e in alike if e["family"] == family), key=lambda e: e["count"], default=None)
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
        return {name: value if name in self.attributes else None for name, value in chosen.items()}

    def _narrowed(self, asked: Condition) -> tuple[Sequence[Entry], str | None]:
        """The training notes that hold as much as can be of what is asked for, and the first label that none has."""
        alike, lacking = self.notes, None
        for name in ("family", "source", "pitch", "velocity"):
            if asked[name] is not None:
                holding = [e for e in alike if _holds(e, name, asked[name])]
                lacking = lacking if holding or lacking else name
                alike = holding or alike
        return alike, lacking

    def _check(self, asked: Condition) -> None:
        """Raise an error if no training notes hold all that is asked for."""
        alike, name = self._narrowed(asked)
        if not self.notes or name is None:
            return
        low, high = asked["pitch"] or (None, None)
        value = asked[name] if name != "pitch" else f"{low}-{high}" if low != high else low
        of = " ".join(asked[k] for k in ("source", "family") if asked[k] is not None and k != name)
        values = sorted({v for e in alike for v in _values(e, name)})
        trained = ", ".join(map(str, values)) if name in ("source", "velocity") else f"{values[0]}-{values[-1]}"
        raise ConfigError(
            f"{name} {value}: the notes{of and f' ({of})'} that the model was trained on are known to have {trained}; "
            "ask for one of these, or set allow_untrained and expect other notes than asked for"
        )


def condition_ids(conditions: Sequence[Condition], attributes: Sequence[str]) -> Tensor:
    """int64 (B, attributes): class of each attribute, CLASSES[name] where it is None."""
    classes: dict[str, Sequence[Any]] = {
        "family": FAMILIES, "source": SOURCES, "pitch": range(128), "velocity": VELOCITIES,
    }  # fmt: skip
    rows = [
        [CLASSES[name] if c[name] is None else classes[name].index(c[name]) for name in attributes] for c in conditions
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(conditions), len(attributes))


def _values(entry: Entry, name: str) -> Sequence[Any]:
    """What the notes of an entry have as `name`, as far as it is known."""
    if name == "pitch":
        return _span(*entry.get("pitch_range", entry["pitch"]))
    if name == "velocity":
        return tuple(entry.get("velocity", VELOCITIES))
    return () if entry[name] is None else (entry[name],)


def _holds(entry: Entry, name: str, value: Any) -> bool:
    """Whether the notes of an entry have this label; of pitches (lowest, highest) any of these."""
    values = _values(entry, name)
    return bool(_overlap(values, value)) if name == "pitch" else value in values


def _span(low: int, high: int) -> range:
    """All from low to high; none where they are not known (-1)."""
    return range(low, high + 1) if low >= 0 else range(0)


def _overlap(pitches: Sequence[int], limits: tuple[int, int]) -> range:
    return range(max(pitches[0], limits[0]), min(pitches[-1], limits[1]) + 1) if pitches else range(0)


def _limits(pitch: int | tuple[int, int]) -> tuple[int, int]:
    """(lowest, highest) of a pitch or of a range of them."""
    if isinstance(pitch, tuple | list):
        if len(pitch) == 2 and _midi("pitch", pitch[0]) <= _midi("pitch", pitch[1]):
            return _midi("pitch", pitch[0]), _midi("pitch", pitch[1])
        raise ConfigError(f"pitch must be a MIDI number 0..127 or a rising range of them (60 is middle C), got {pitch}")
    number = _midi("pitch", pitch)
    return number, number


def _midi(name: str, value: Any) -> int:
    return integer(f"{name}{' (a MIDI number; 60 is middle C)' if name == 'pitch' else ''}", value, 0, 127)


def level(velocity: int) -> int:
    """The velocity that a model takes it for."""
    return min(VELOCITIES, key=lambda v: abs(v - velocity))


def _pick(items: Sequence[Any], uniform: float) -> Any:
    """The item at `uniform` in [0, 1)."""
    return items[min(int(uniform * len(items)), len(items) - 1)]
