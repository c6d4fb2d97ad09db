"""All metrics of a set of notes against real ones, in one profile, with the baselines that make them readable."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import mars
from mars.config import AudioConfig
from mars.errors import ConfigError, DataError
from mars.evaluate.baselines import anchor, griffin_lim_oracle, halves
from mars.evaluate.embedders import features
from mars.evaluate.embedders.classifier import Classifier, logits_vinay2022
from mars.evaluate.embedders.features import Embedder, Embedding
from mars.evaluate.metrics import frechet, inception_score, kad, kid, mel, ndb, prdc
from mars.evaluate.metrics.bootstrap import SEED, Estimate, bootstrap_mean, bootstrap_median
from mars.evaluate.metrics.pitch import detected, judged, pitch_accuracy
from mars.evaluate.metrics.samples import canonical
from mars.evaluate.report import METRICS, Metric, Mode, Profile, Report, Sounds
from mars.evaluate.sets import NoteSet, pair
from mars.runtime import stream, thread_pool

Role = Literal["pitch", "instrument", "vggish", "crepe"]
ROLES: tuple[Role, ...] = ("pitch", "instrument", "vggish", "crepe")
# A network for each role, or the reason why there is none.
Embedders = Mapping[Role, Embedder | str]
Progress = Callable[[str, int, int], None]  # called with what is being done, notes done and all of them

TABLE_1 = ("ndb_k", "pkid", "ikid", "pis", "iis", "mse", "mae", "fad")  # of the paper
REAL_VS_REAL, ORACLE, ANCHOR = "real-vs-real", "griffin-lim oracle", "anchor"
NDB_REFERENCE = 50_000  # training notes at most that bins are made of
KID_SUBSET = 1000  # notes at most
NO_TRAINING_NOTES = "want the training notes (`train`)"
SHOWN = 6  # notes that a report lets one hear
ALL_NOTES = "all notes at once"  # what a value and its interval are of, which usually is published of parts

_BATCH = 64  # notes whose log-mels a thread computes at a time
_BLOCK = 4096  # training notes whose log-mels are in memory at once


class Unavailable(ConfigError):
    """A metric that cannot be computed with what there is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What to compute, and how.

    Raises:
        ConfigError: a metric does not exist, or not in this profile or mode.
    """

    profile: Profile = "standard"
    mode: Mode = "generation"
    metrics: tuple[str, ...] = ()  # each must be computed; none named: all that can be
    seed: int = SEED
    bins: int = 100  # of NDB
    as_published: bool = False  # vinay2022: the pitch network stands in for the instrument network, and the reverse

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in METRICS:
                raise ConfigError(f"unknown metric {name!r}; known: {', '.join(METRICS)}")
            if name not in self.possible:
                raise ConfigError(
                    f"{name} is not computed for {self.mode} in the profile {self.profile}; "
                    f"that has {', '.join(self.possible)}"
                )
        if self.as_published and self.profile != "vinay2022":
            raise ConfigError("the label order as published exists in the profile vinay2022 only")

    @property
    def possible(self) -> tuple[str, ...]:
        """The metrics of this profile and mode, in their order."""
        if self.profile == "vinay2022":
            return TABLE_1
        return tuple(name for name in METRICS if name != "copy_ratio" or self.mode == "generation")

    @property
    def wanted(self) -> tuple[str, ...]:
        """The metrics to compute, in their order."""
        return tuple(name for name in self.possible if not self.metrics or name in self.metrics)

    @property
    def roles(self) -> frozenset[Role]:
        """Of the networks that the metrics to compute listen with."""
        found = (measure.role for measure in MEASURES[self.profile] if not set(self.wanted).isdisjoint(measure.names))
        return frozenset(_swapped(role) if self.as_published else role for role in found if role is not None)


def check(settings: Settings, embedders: Embedders, train: NoteSet | None) -> None:
    """See that there is what the metrics that the settings name need beside the notes.

    Raises:
        Unavailable: a network, or the training notes, are not there.
    """
    networks = _roles(settings, embedders)
    for measure in MEASURES[settings.profile]:
        reason = measure.role and networks[measure.role]
        if isinstance(reason, str):
            for name in settings.metrics:
                if name in measure.names:
                    raise Unavailable(f"{name}: {reason}")
    if "copy_ratio" in settings.metrics and train is None:
        raise Unavailable(f"copy_ratio: {NO_TRAINING_NOTES}")


@dataclass(frozen=True)
class Evaluation:
    """A report, and some of the notes to hear: a title and the waveforms (samples,) by what they are."""

    report: Report
    shown: list[tuple[str, dict[str, Tensor]]]


def evaluate(
    real: NoteSet,
    fake: NoteSet,
    embedders: Embedders,
    settings: Settings,
    *,
    cache: Path,
    train: NoteSet | None = None,
    audio: AudioConfig | None = None,
    baselines: bool = True,
    progress: Progress | None = None,
    device: str = "cpu",
    produced: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Score notes against real ones, paired by their ids if they are reconstructions.

    Args:
        cache: folder of features, see `mars.evaluate.embedders.features`.
        train: notes that a model learned from: NDB's bins are made of them, and copies of them looked for.
        audio: front end of the Griffin-Lim oracle; None: the default one.
        baselines: whether to compute the rows real-vs-real, griffin-lim oracle and anchor as well.
        device, produced: for the report: where the networks ran, how the notes were made.

    Raises:
        ConfigError: a metric that the settings name needs what is not there.
        DataError: notes do not pair up, cannot be read any more, or are too few for a metric that the settings name.
    """
    began = time.perf_counter()
    check(settings, embedders, train)
    if settings.mode == "reconstruction":
        real, fake = pair(real, fake)
        unlabelled = fake.pitch < 0
        fake = replace(fake, pitch=np.where(unlabelled, real.pitch, fake.pitch))
    scorer = _Scorer(settings, embedders, train, cache, progress)
    truth = _Notes(real, scorer)
    rows = {"": _Row(truth, _Notes(fake, scorer), scorer)}
    if baselines:
        one, other = (_Notes(half, scorer, truth) for half in halves(real, settings.seed))
        oracle = griffin_lim_oracle(real, audio or AudioConfig(), seed=settings.seed)
        rows[REAL_VS_REAL] = _Row(one, other, scorer, paired=False)
        rows[ORACLE] = _Row(truth, _Notes(oracle, scorer), scorer)
        rows[ANCHOR] = _Row(truth, _Notes(anchor(real), scorer), scorer)
    if train is not None and "copy_ratio" in settings.wanted:
        scorer.find_copies([row for name, row in rows.items() if name in ("", REAL_VS_REAL)])
    shown: list[tuple[str, dict[str, Tensor]]] = []
    scored: dict[str, dict[str, Metric]] = {}
    for name, row in rows.items():
        scored[name] = scorer.score(row, strict=not name)
        if not name and "mse" in settings.wanted:
            shown = _shown(rows)
        row.fake.forget()
    sets = {"real": real, "fake": fake}
    if train is not None and not {"ndb_k", "copy_ratio"}.isdisjoint(settings.wanted):
        sets["train"] = train
    report = Report(
        profile=settings.profile,
        mode=settings.mode,
        seed=settings.seed,
        metrics=scored.pop(""),
        baselines=scored,
        sets={name: _sounds(notes) for name, notes in sets.items()},
        embedders=scorer.used,
        versions=_versions(),
        device=device,
        threads=torch.get_num_threads(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - began, 1),
        produced=produced or {},
    )
    return Evaluation(report, shown)


class _Notes:
    """A set of notes with what the metrics ask of it, computed when it is first asked for."""

    def __init__(self, notes: NoteSet, scorer: _Scorer, whole: _Notes | None = None) -> None:
        self.notes, self._scorer, self._whole = notes, scorer, whole
        self._known: dict[Role, Embedding] = {}
        self._published: dict[tuple[Role, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self.notes)

    @cached_property
    def _places(self) -> Tensor:
        """Of the notes in the whole that they are a part of."""
        assert self._whole is not None
        places = {key: i for i, key in enumerate(self._whole.notes.keys)}
        return torch.tensor([places[key] for key in self.notes.keys])

    @cached_property
    def log_mel(self) -> Tensor:
        """(n, 80, 251)."""
        if self._whole is not None:
            return self._whole.log_mel[self._places]
        return self._scorer.log_mel(self.notes)

    def embedding(self, role: Role) -> Embedding:
        """What the role's network says, which there is."""
        if role not in self._known:
            if self._whole is None:
                self._known[role] = self._scorer.embed(self.notes, role)
            else:
                whole = self._whole.embedding(role)
                logits = None if whole.logits is None else whole.logits[self._places]
                self._known[role] = Embedding(whole.frames[self._places], logits)
        return self._known[role]

    def published_logits(self, role: Role, key: int) -> Tensor:
        """Logits of the role's classifier in training mode."""
        if (role, key) not in self._published:
            self._published[role, key] = self._scorer.training_logits(self.notes, role, key)
        return self._published[role, key]

    @cached_property
    def bins(self) -> ndb.Bins:
        """Those of NDB."""
        return self._scorer.fit_bins(self.log_mel)

    def forget(self) -> None:
        """Free the memory of all that was computed."""
        self.__dict__.pop("log_mel", None)
        self._known.clear()


class _Row:
    """Notes and the real ones that they are compared with."""

    def __init__(self, real: _Notes, fake: _Notes, scorer: _Scorer, paired: bool = True) -> None:
        self.real, self.fake = real, fake
        self._paired, self._generated = paired, scorer.settings.mode == "generation"
        self.copies: mel.Nearest | None = None  # the training note nearest to each

    @cached_property
    def errors(self) -> mel.Nearest:
        """Mel errors of each note against its original, or against the nearest real note.

        Raises:
            Unavailable: there are no originals.
        """
        if self._generated:
            return mel.nearest(self.fake.log_mel, self.real.log_mel)
        if not self._paired:
            raise Unavailable("the notes have no originals to be compared with")
        return mel.Nearest(torch.arange(len(self.fake)), mel.mel_errors(self.real.log_mel, self.fake.log_mel))


class _Scorer:
    """Computes the metrics of rows."""

    def __init__(
        self, settings: Settings, embedders: Embedders, train: NoteSet | None, cache: Path, progress: Progress | None
    ) -> None:
        self.settings, self.train, self._cache, self._progress = settings, train, cache, progress
        self._embedders = _roles(settings, embedders)
        self.used: dict[str, dict[str, Any]] = {}

    def score(self, row: _Row, *, strict: bool) -> dict[str, Metric]:
        """The settings' metrics; strict: those that they name must be there."""
        found: dict[str, Metric] = {}
        for measure in MEASURES[self.settings.profile]:
            wanted = [name for name in measure.names if name in self.settings.wanted]
            if not wanted:
                continue
            embedder = None if measure.role is None else self._embedders[measure.role]
            if not isinstance(embedder, str):
                for side in (row.real, row.fake):  # outside of the clause: a file that has changed spoils everything
                    side.embedding(measure.role) if measure.role else side.log_mel
            began = time.perf_counter()
            try:
                if isinstance(embedder, str):
                    raise Unavailable(embedder)
                metrics = measure.compute(self, row)
            except (ConfigError, DataError) as error:
                if strict and self.settings.metrics:
                    raise type(error)(f"{', '.join(wanted)}: {error}") from None
                metrics = {name: Metric(reason=str(error)) for name in wanted}
            same: dict[str, Any] = {
                "n_real": len(row.real),
                "n_fake": len(row.fake),
                "embedder": embedder.id if embedder is not None and not isinstance(embedder, str) else "",
                "seconds": round(time.perf_counter() - began, 3),
            }
            found |= {name: replace(metrics[name], **same) for name in wanted}
        return {name: found[name] for name in self.settings.wanted}

    def embed(self, notes: NoteSet, role: Role) -> Embedding:
        """What the role's network, which there is, says of the notes."""
        embedder = self._embedders[role]
        assert not isinstance(embedder, str)
        self.used[embedder.id] = {"sha256": embedder.sha256, "front_end": embedder.front_end}
        if isinstance(embedder, Classifier):
            validation = embedder.document["validation"]
            self.used[embedder.id]["accuracy"] = None if validation is None else validation["accuracy"]
        return features.embed(notes, embedder, self._cache, progress=self._told(f"{embedder.id}, {notes.source}"))

    def training_logits(self, notes: NoteSet, role: Role, key: int) -> Tensor:
        """Logits of the role's classifier in training mode, as the published scripts leave it."""
        made = self._embedders[role]
        assert isinstance(made, Classifier)
        told = self._told(f"{made.id} in training mode, {notes.source}")
        return logits_vinay2022(made, notes, seed=self.settings.seed, key=key, progress=told)

    def classes(self, role: Role) -> tuple[str, ...]:
        """What the logits of the role's network, which there is, stand for. Raises `Unavailable`."""
        embedder = self._embedders[role]
        assert not isinstance(embedder, str)
        if embedder.classes is None:
            raise Unavailable(f"nobody knows which class of {embedder.id} is which")
        return embedder.classes

    def log_mel(self, notes: NoteSet) -> Tensor:
        """Log-mel spectrograms (n, 80, 251) of all notes."""
        return next(self.log_mel_blocks(notes, len(notes)))

    def log_mel_blocks(self, notes: NoteSet, size: int = _BLOCK) -> Iterator[Tensor]:
        """Log-mel spectrograms (up to `size`, 80, 251), block after block, on all cores."""
        told = self._told(f"log-mel, {notes.source}")
        with thread_pool(torch.get_num_threads()) as pool:
            for start in range(0, len(notes), size):
                rows = range(start, min(start + size, len(notes)))
                batches = [rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH)]
                block = torch.empty(len(rows), *mel.SHAPE)
                made = pool.map(lambda batch: mel.log_mel(notes.waveforms(batch)), batches)
                for batch, place, part in zip(batches, block.split(_BATCH), made, strict=True):
                    place.copy_(part)
                    told(batch[-1] + 1, len(notes))
                yield block

    def fit_bins(self, log_mel: Tensor) -> ndb.Bins:
        """Bins of NDB of reference notes (n, 80, 251)."""
        fit = ndb.fit_bins if self.settings.profile == "standard" else ndb.fit_bins_vinay2022
        return fit(log_mel.flatten(1), self.settings.bins, seed=self.settings.seed)

    @cached_property
    def training_bins(self) -> ndb.Bins:
        """Bins of the training notes, or of NDB_REFERENCE of them, whatever their order."""
        assert self.train is not None
        order = np.argsort(np.array(self.train.keys))
        chosen = torch.randperm(len(order), generator=stream(self.settings.seed))[:NDB_REFERENCE].numpy()
        return self.fit_bins(self.log_mel(self.train.subset(order[np.sort(chosen)])))

    def find_copies(self, rows: Sequence[_Row]) -> None:
        """Look for the training note nearest to each note of the rows, in one pass through the training notes."""
        assert self.train is not None
        found = mel.nearest(torch.cat([row.fake.log_mel for row in rows]), self.log_mel_blocks(self.train))
        sizes = [len(row.fake) for row in rows]
        columns = (x.split(sizes) for x in (found.index, found.errors.mse, found.errors.mae))
        for row, index, mse, mae in zip(rows, *columns, strict=True):
            row.copies = mel.Nearest(index, mel.MelErrors(mse, mae))

    def _told(self, what: str) -> Callable[[int, int], None]:
        progress = self._progress
        return (lambda done, of: None) if progress is None else partial(progress, what)


@dataclass(frozen=True, slots=True)
class _Measure:
    """Metrics that are computed together, from log-mels or from what a network says."""

    names: tuple[str, ...]
    role: Role | None  # None: log-mels
    compute: Callable[[_Scorer, _Row], dict[str, Metric]]


def _mel_errors(scorer: _Scorer, row: _Row) -> dict[str, Metric]:
    found = row.errors
    details: dict[str, Any] = {}
    if scorer.settings.mode == "generation":
        details = {
            "nearest_real_notes": found.distinct,  # of how many different ones
            "most_frequent": int(found.index.bincount().max()),
        }
    params = {"against": "nearest real note" if details else "the original", "unit": "100 dB"}
    values = {"mse": found.errors.mse, "mae": found.errors.mae}
    return {name: _metric(bootstrap_mean(x, seed=scorer.settings.seed), params, details) for name, x in values.items()}


def _ndb(scorer: _Scorer, row: _Row) -> dict[str, Metric]:
    reference, k = scorer.train or row.real.notes, scorer.settings.bins
    if len(reference) < k:
        raise DataError(f"want a note or more for each of {k} bins, got {len(reference)}; have fewer bins: `bins`")
    bins = row.real.bins if scorer.train is None else scorer.training_bins
    found = ndb.different_bins(bins, row.fake.log_mel.flatten(1))
    details = {
        "std": found.ratio_std, "clusterings": list(found.ratios),
        "jensen_shannon": found.divergence, "jensen_shannon_std": found.divergence_std, "explained": bins.explained,
    }  # fmt: skip
    if scorer.train is not None:
        details["floor"] = ndb.different_bins(bins, row.real.log_mel.flatten(1)).ratio  # of the real notes
    params = {
        "k": found.bins, "alpha": ndb.ALPHA, "runs": len(found.ratios), "features": bins.centres.shape[2],
        "reference": "real" if scorer.train is None else "train", "n_reference": found.reference,
    }  # fmt: skip
    return {"ndb_k": Metric(value=found.ratio, params=params, details=details)}


def _kid(name: str, role: Role, scorer: _Scorer, row: _Row) -> dict[str, Metric]:
    real, fake = (side.embedding(role).frames[:, 0] for side in (row.real, row.fake))
    # A subset of all notes would always be the same one.
    size = KID_SUBSET if min(len(real), len(fake)) > KID_SUBSET else min(len(real), len(fake)) // 2
    found = kid.kid(real, fake, subset_size=size, seed=scorer.settings.seed)
    details = {
        "subsets_mean": found.mean, "subsets_std": found.std,
        "subsets": found.subsets, "subset_size": found.subset_size,
    }  # fmt: skip
    return {name: _metric(found.full, {"kernel": "(<x, y> / d + 1)^3", "of": ALL_NOTES}, details)}


def _kid_vinay2022(name: str, role: Role, scorer: _Scorer, row: _Row) -> dict[str, Metric]:
    if len(row.real) != len(row.fake):  # before minutes of listening
        raise DataError(f"want as many notes to evaluate as real ones, got {len(row.fake)} and {len(row.real)}")
    found = kid.kid_vinay2022(*(side.published_logits(role, i) for i, side in enumerate((row.real, row.fake))))
    params = {
        "kernel": "16 / (16 + |x - y|^2), with diagonal", "network": "in training mode",
        "label_order": _label_order(scorer),
    }  # fmt: skip
    return {name: Metric(value=found.mean, params=params, details={"std": found.std, "blocks": found.blocks})}


def _inception_score(name: str, role: Role, scorer: _Scorer, row: _Row) -> dict[str, Metric]:
    found = inception_score.inception_score(_logits(row.fake, role), seed=scorer.settings.seed)
    of_real = inception_score.inception_score(_logits(row.real, role), seed=scorer.settings.seed)
    details = {
        "splits_mean": found.mean, "splits_std": found.std, "splits": found.splits, "real": of_real.full.value,
    }  # fmt: skip
    return {name: _metric(found.full, {"classes": found.classes, "of": ALL_NOTES}, details)}


def _inception_score_vinay2022(name: str, role: Role, scorer: _Scorer, row: _Row) -> dict[str, Metric]:
    logits = _logits(row.fake, role)
    found = inception_score.inception_score_vinay2022(logits)
    shuffled = logits[torch.randperm(len(logits), generator=stream(scorer.settings.seed))]
    details = {
        "std": found.std, "notes": found.notes,
        "shuffled": inception_score.inception_score_vinay2022(shuffled).mean,
        "real": inception_score.inception_score_vinay2022(_logits(row.real, role)).mean,
    }  # fmt: skip
    params = {"order": "of the files", "classes": found.classes, "label_order": _label_order(scorer)}
    return {name: Metric(value=found.mean, params=params, details=details)}


def _fad(scorer: _Scorer, row: _Row) -> dict[str, Metric]:
    found = frechet.fad(*_frames(row, "vggish"), seed=scorer.settings.seed)
    details = {"frames_real": found.frames_real, "frames_fake": found.frames_fake}
    return {"fad": _metric(found.estimate, {}, details)}


def _fad_infinity(scorer: _Scorer, row: _Row) -> dict[str, Metric]:
    found = frechet.fad_infinity(*_frames(row, "vggish"), seed=scorer.settings.seed)
    details = {"slope": found.slope, "notes": list(found.notes), "distances": list(found.distances)}
    return {"fad_infinity": Metric(value=found.value, details=details)}


def _fad_classifier(scorer: _Scorer, row: _Row) -> dict[str, Metric]:
    real, fake = (frechet.Moments.of(canonical(frames[:, 0])) for frames in _frames(row, "instrument"))
    return {"fad_classifier": Metric(value=real.distance(fake), params={"features": len(real.mean)})}


def _kad(name: str, role: Role, scorer: _Scorer, row: _Row) -> dict[str, Metric]:
    found = kad.kad(*_frames(row, role), seed=scorer.settings.seed)
    return {name: _metric(found.estimate, {"kernel": "Gaussian", "times": kad.SCALE}, {"bandwidth": found.bandwidth})}


def _prdc(scorer: _Scorer, row: _Row) -> dict[str, Metric]:
    real, fake = (frames[:, 0] for frames in _frames(row, "instrument"))
    found = prdc.prdc(real, fake, seed=scorer.settings.seed)
    return {name: _metric(getattr(found, name), {"neighbours": found.k}) for name in PRDC}


def _pitch_accuracy(name: str, role: Role, scorer: _Scorer, row: _Row) -> dict[str, Metric]:
    asked, classes, logits = row.fake.notes.pitch, scorer.classes(role), _logits(row.fake, role)
    found = pitch_accuracy(asked, logits, classes)
    correct = torch.from_numpy((detected(logits, classes) == asked)[judged(asked, classes)]).double()
    return {name: _metric(bootstrap_mean(correct, seed=scorer.settings.seed), {}, asdict(found))}


def _copy_ratio(scorer: _Scorer, row: _Row) -> dict[str, Metric]:
    if row.copies is None:
        raise Unavailable(NO_TRAINING_NOTES if scorer.train is None else "want notes that may be copies")
    ratio = mel.copy_ratio(row.copies, row.errors)
    details = {"below_half": float((ratio < 0.5).double().mean()), "lowest": float(ratio.min())}
    params = {"distance": "of log-mels", "value": "median", "n_train": len(scorer.train or ())}
    ratio = ratio.clamp(max=1000)  # infinite for a note that is a real one, bit for bit
    return {"copy_ratio": _metric(bootstrap_median(ratio, seed=scorer.settings.seed), params, details)}


PRDC = ("precision", "recall", "density", "coverage")
MEASURES: dict[Profile, tuple[_Measure, ...]] = {
    "standard": (
        _Measure(("mse", "mae"), None, _mel_errors),
        _Measure(("ndb_k",), None, _ndb),
        _Measure(("copy_ratio",), None, _copy_ratio),
        _Measure(("pkid",), "pitch", partial(_kid, "pkid", "pitch")),
        _Measure(("pis",), "pitch", partial(_inception_score, "pis", "pitch")),
        _Measure(("pitch_accuracy",), "pitch", partial(_pitch_accuracy, "pitch_accuracy", "pitch")),
        _Measure(("ikid",), "instrument", partial(_kid, "ikid", "instrument")),
        _Measure(("iis",), "instrument", partial(_inception_score, "iis", "instrument")),
        _Measure(PRDC, "instrument", _prdc),
        _Measure(("fad_classifier",), "instrument", _fad_classifier),
        _Measure(("kad_classifier",), "instrument", partial(_kad, "kad_classifier", "instrument")),
        _Measure(("fad",), "vggish", _fad),
        _Measure(("fad_infinity",), "vggish", _fad_infinity),
        _Measure(("kad",), "vggish", partial(_kad, "kad", "vggish")),
        _Measure(("pkid_crepe",), "crepe", partial(_kid, "pkid_crepe", "crepe")),
        _Measure(("pis_crepe",), "crepe", partial(_inception_score, "pis_crepe", "crepe")),
        _Measure(("pitch_accuracy_crepe",), "crepe", partial(_pitch_accuracy, "pitch_accuracy_crepe", "crepe")),
    ),
    "vinay2022": (
        _Measure(("mse", "mae"), None, _mel_errors),
        _Measure(("ndb_k",), None, _ndb),
        _Measure(("pkid",), "pitch", partial(_kid_vinay2022, "pkid", "pitch")),
        _Measure(("pis",), "pitch", partial(_inception_score_vinay2022, "pis", "pitch")),
        _Measure(("ikid",), "instrument", partial(_kid_vinay2022, "ikid", "instrument")),
        _Measure(("iis",), "instrument", partial(_inception_score_vinay2022, "iis", "instrument")),
        _Measure(("fad",), "vggish", _fad),
    ),
}  # fmt: skip


def _roles(settings: Settings, embedders: Embedders) -> dict[Role, Embedder | str]:
    """The network of each role with these settings."""
    return {role: embedders[_swapped(role) if settings.as_published else role] for role in ROLES}


def _swapped(role: Role) -> Role:
    """The role whose network stands in for this one's in the published constants."""
    swapped: dict[Role, Role] = {"pitch": "instrument", "instrument": "pitch"}
    return swapped.get(role, role)


def _metric(found: Estimate, params: Mapping[str, Any], details: Mapping[str, Any] | None = None) -> Metric:
    return Metric(value=found.value, low=found.low, high=found.high, params=params, details=details or {})


def _frames(row: _Row, role: Role) -> tuple[Tensor, Tensor]:
    return row.real.embedding(role).frames, row.fake.embedding(role).frames


def _logits(notes: _Notes, role: Role) -> Tensor:
    logits = notes.embedding(role).logits
    assert logits is not None  # all that scores are made of are classifiers
    return logits


def _label_order(scorer: _Scorer) -> str:
    return "as published" if scorer.settings.as_published else "correct"


def _shown(rows: Mapping[str, _Row]) -> list[tuple[str, dict[str, Tensor]]]:
    """Notes with low, middling and high errors beside their originals, or the real notes nearest to them."""
    row = rows[""]
    order = row.errors.errors.mse.argsort()
    places = torch.linspace(0, len(order) - 1, min(SHOWN, len(order)), dtype=torch.float64).round().long()
    shown = []
    for rank in places.tolist():
        i = int(order[rank])
        original = int(row.errors.index[i])
        sounds = {"real": row.real.notes, "evaluated": row.fake.notes}
        sounds |= {name: other.fake.notes for name, other in rows.items() if name in (ORACLE, ANCHOR)}
        title = f"{row.fake.notes.names[i]}: error {rank + 1:,} of {len(order):,}"
        waveforms = {
            what: notes.waveforms([i if what == "evaluated" else original])[0] for what, notes in sounds.items()
        }
        shown.append((title, waveforms))
    return shown


def _sounds(notes: NoteSet) -> Sounds:
    record = notes.record
    return Sounds(
        source=notes.source,
        notes=len(notes),
        fingerprint=notes.fingerprint,
        padded=len(record.padded),
        cut=len(record.cut),
        clipped=len(record.clipped),
        refused=record.refused,
    )


def _versions() -> dict[str, str]:
    found = {"mars": mars.__version__}
    for name in ("numpy", "torch", "torchmetrics", "scikit-learn"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
