"""SFZ, the text file that tells a sampler which sample to play for which key (sfzformat.com)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

RELEASE = 0.25  # s that a note sounds on after its key


@dataclass(frozen=True)
class Region:
    """A sample and the keys and velocities that play it, all inclusive."""

    file: str
    keys: tuple[int, int]
    velocities: tuple[int, int]
    key: int  # that plays it as it is
    tune: int  # cents that it is raised by, to be in tune
    volume: float  # dB
    loop: tuple[int, int] | None  # first and last sample


def spread(pitches: Sequence[int], reach: int) -> dict[int, tuple[int, int]]:
    """Return the keys that each rising pitch serves, up to the middle between neighbours, `reach` outside."""
    edges = [(low + high) // 2 for low, high in pairwise(pitches)]
    lows = [max(pitches[0] - reach, 0), *(edge + 1 for edge in edges)]
    highs = [*edges, min(pitches[-1] + reach, 127)]
    return {pitch: (low, high) for pitch, low, high in zip(pitches, lows, highs, strict=True)}


def layers(velocities: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Return the velocities, 1 to 127, that each of these rising ones serves: up to the middle between neighbours."""
    edges = [(low + high) // 2 for low, high in pairwise(velocities)]
    return {
        velocity: (low, high)
        for velocity, low, high in zip(velocities, [1, *(edge + 1 for edge in edges)], [*edges, 127], strict=True)
    }


def text(comments: Iterable[str], regions: Iterable[Region]) -> str:
    """Return the file's text; comments are its first lines."""
    lines = [*(f"// {comment}" for comment in comments), "", f"<global> ampeg_release={RELEASE}", ""]
    for region in regions:
        found = {
            "sample": region.file,
            "lokey": region.keys[0],
            "hikey": region.keys[1],
            "lovel": region.velocities[0],
            "hivel": region.velocities[1],
            "pitch_keycenter": region.key,
            "tune": region.tune,
            "volume": f"{region.volume:.1f}",
            "loop_mode": "loop_continuous" if region.loop else "no_loop",
        }
        if region.loop:
            found |= {"loop_start": region.loop[0], "loop_end": region.loop[1]}
        lines.append("<region> " + " ".join(f"{name}={value}" for name, value in found.items()))
    return "\n".join(lines) + "\n"
