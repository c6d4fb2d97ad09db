"""The paper's Table 1 (Ristori, Bindini and Frasconi, arXiv:2509.26007), figure by figure, to stand beside one's own.

Its rows DiffWave, DDSP and NSynth are those of Vinay and Lerch 2022 ("Evaluating generative audio systems and their
metrics", ISMIR), who have one more: notes low-passed at 1 kHz and reduced to 8 bit. Nothing here was computed by mars.
The statistics are those of the profile vinay2022; what neither paper states is in docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mars.evaluate.report import Mode, Profile

PROFILE: Profile = "vinay2022"  # whose statistics are behind the table

_METRICS = ("ndb_k", "pkid", "ikid", "pis", "iis", "mse", "mae", "fad")  # the table's columns, by our names


@dataclass(frozen=True, slots=True)
class Published:
    """A row of the table."""

    name: str
    mode: Mode
    source: str
    notes: int | None  # evaluated; None: the paper does not say
    figures: Mapping[str, float]


def _row(name: str, mode: Mode, source: str, notes: int | None, *figures: float) -> Published:
    return Published(name, mode, source, notes, dict(zip(_METRICS, figures, strict=True)))


_MARS, _VINAY = "Ristori et al. 2025, Table 1", "Vinay and Lerch 2022"

TABLE_1 = (
    _row("DiffWave", "reconstruction", _VINAY, 4096, 0.74, 0.0093, 0.0021, 2.3814, 5.6477, 0.0291, 0.1369, 7.9488),
    _row("DDSP", "reconstruction", _VINAY, 4096, 0.20, 0.0053, 0.0020, 3.3224, 5.3371, 0.0130, 0.0666, 1.1519),
    _row("NSynth", "reconstruction", _VINAY, 4096, 0.74, 0.0101, 0.0024, 2.3238, 4.6364, 0.0329, 0.1224, 4.0590),
    _row("anchor", "reconstruction", _VINAY, 4096, 0.72, 0.0123, 0.0006, 2.9356, 5.3017, 0.0257, 0.0857, 1.4952),
    _row("MARS", "reconstruction", _MARS, None, 0.19, 0.0035, 0.0015, 2.9602, 5.2047, 0.0143, 0.0915, 1.6429),
    _row("MARS, generated", "generation", _MARS, None, 0.15, 0.0066, 0.0017, 3.2220, 4.5357, 0.0201, 0.0795, 1.8833),
)
