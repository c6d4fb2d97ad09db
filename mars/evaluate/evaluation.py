"""Whole evaluations, from folders and models to a report: all that `mars-eval` does, for Python.

`run` scores notes that are there; `reconstruct` and `generate` let a model make them first. What can be wrong with
settings, networks, training notes and the places of the reports is found before hours are spent.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mars.config import AudioConfig
from mars.data import open_dataset
from mars.errors import ConfigError, DiskError
from mars.evaluate import page, produce, report
from mars.evaluate.bootstrap import SEED
from mars.evaluate.embedders import crepe, roles
from mars.evaluate.embedders.classifier import Classifier
from mars.evaluate.extractor import Progress
from mars.evaluate.report import Mode, Profile, Report
from mars.evaluate.scoring import Settings, check, evaluate
from mars.evaluate.sets import NoteSet, can_pair, open_notes
from mars.files import new_folder, probe
from mars.model import Model, load
from mars.runtime import pick_device
from mars.terminal import log

Split = Literal["train", "valid", "test"]
Say = Callable[[str], None]  # called with a warning, which names arguments in backquotes


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How notes are scored.

    Args:
        profile: "vinay2022" has the statistics behind the published baselines, their flaws included.
        metrics: these must be computed, and no others; none named: all that can be.
        seed: of all that is drawn.
        bins: k of NDB/k.
        as_published: swap the two classifiers, as the published constants do; in the profile vinay2022 only.
        train: notes that the model learned from, a folder or a packed dataset: NDB's bins are made of them, and copies
            of them looked for.
        split: of packed datasets.
        allow_bad: share of the files of a folder that may be left out, and are listed in the report.
        preset: of the classifiers; None: "full", and "sony" in the profile vinay2022.
        pitch_classifier: directory of the classifier of pitches, instead.
        instrument_classifier: directory of that of instruments, instead.
        vggish: file of VGGish's weights; None: those in $MARS_WEIGHTS_DIR.
        crepe: its size.
        force: take classifiers that are less accurate than their gate asks.
        baselines: add rows for real notes against real ones, Griffin-Lim alone, and low-passed 8-bit notes.
        cache: folder where features are kept; None: they are not.
        device: where networks run: auto, cpu, cuda, mps, ….
    """

    profile: Profile = "standard"
    metrics: tuple[str, ...] = ()
    seed: int = SEED
    bins: int = 100
    as_published: bool = False
    train: Path | None = None
    split: Split = "test"
    allow_bad: float = 0.0
    preset: str | None = None
    pitch_classifier: Path | None = None
    instrument_classifier: Path | None = None
    vggish: Path | None = None
    crepe: crepe.Size = "tiny"
    force: bool = False
    baselines: bool = True
    cache: Path | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Result:
    """A report and the files that it was written to."""

    report: Report
    files: tuple[Path, ...]


def run(
    real: Path,
    fake: Path,
    options: Options | None = None,
    *,
    pairs: bool = False,
    json_file: Path | None = None,
    html_file: Path | None = None,
    say: Say | None = None,
    progress: Progress | None = None,
) -> Result:
    """Score the notes in a folder, or in a packed dataset, against real ones.

    Args:
        pairs: the notes are reconstructions of the real ones, and pair up with them by name; otherwise they are taken
            for newly generated ones, whose mel errors are those against the nearest real note.
        json_file: where to write the report.
        html_file: where to write a page of it with pictures and sounds.
        say: called with warnings; None: they go to the logger `mars`.
        progress: called with the task, the notes done and their total.

    Raises:
        MarsError: an option, a network, a set of notes or a place for the report cannot be used.
    """
    evaluation = _Evaluation("reconstruction" if pairs else "generation", options or Options(), say, progress)
    sets = evaluation.open(real), evaluation.open(fake)
    if not pairs and can_pair(*sets):
        evaluation.say(
            f"note: every note of {fake} has the name of a real one; if they are reconstructions of these, "
            "say so with `pairs`: mel errors are then those against the original, not the nearest real note"
        )
    _writable(json_file, html_file)
    return evaluation.score(*sets, json_file, html_file)


def reconstruct(
    out: Path | None = None,
    options: Options | None = None,
    *,
    model: str | Path | None = None,
    data: Path | None = None,
    n: int | None = None,
    iterations: int = 32,
    refine: int = 0,
    begun: Callable[[Path], None] | None = None,
    say: Say | None = None,
    progress: Progress | None = None,
) -> Result:
    """Encode and decode real notes with a model's tokenizer, and score what comes out against them.

    Args:
        out: folder for `notes/` and the reports, of which each profile has its own; None: a new one in `evaluations/`.
            An interrupted one goes on where it was.
        model: see `mars.model.load`.
        data: real notes, a folder or a packed dataset; None: the built-in ones.
        n: so many of the notes, drawn with the seed; None: all.
        iterations: of Griffin-Lim.
        refine: steps by which the tokens are improved; see `mars.model.Model.encode`.
        begun: called with the folder before the first note is made.
        say: called with warnings; None: they go to the logger `mars`.
        progress: called with what is being done, notes done and all of them.

    Raises:
        MarsError: an option, a network, a model, a set of notes or the folder cannot be used.
    """
    evaluation = _Evaluation("reconstruction", options or Options(), say, progress)
    seed = evaluation.settings.seed
    real = evaluation.open(data)
    if n is not None:
        real = real.shuffled(seed).subset(range(min(n, len(real))))
    with_model = evaluation.load(model, "tokenizer", data)
    out = evaluation.begin(out, data, begun)
    produced = produce.reconstruct(
        with_model,
        real,
        out / "notes",
        iterations=iterations,
        refine=refine,
        seed=seed,
        progress=evaluation.progress("reconstruct"),
    )
    return evaluation.score_made(real, out, produced, with_model.config.audio)


def generate(
    out: Path | None = None,
    options: Options | None = None,
    *,
    model: str | Path | None = None,
    data: Path | None = None,
    n: int = 4096,
    cfg: float = 2.0,
    top_k: int = 900,
    top_p: float = 0.96,
    iterations: int = 32,
    begun: Callable[[Path], None] | None = None,
    say: Say | None = None,
    progress: Progress | None = None,
) -> Result:
    """Generate n notes with the labels of real ones, and score them against these.

    Args:
        out: folder for `notes/` and the reports, as for `reconstruct`.
        model: see `mars.model.load`.
        data: real notes, a folder or a packed dataset; None: the built-in ones.
        n: number of notes.
        cfg: guidance, as for `mars.model.Model.generate`.
        top_k: as for `mars.model.Model.generate`.
        top_p: as for `mars.model.Model.generate`.
        iterations: of Griffin-Lim.
        begun: called with the folder before the first note is made.
        say: called with warnings; None: they go to the logger `mars`.
        progress: called with what is being done, notes done and all of them.

    Raises:
        MarsError: an option, a network, a model, a set of notes or the folder cannot be used.
    """
    evaluation = _Evaluation("generation", options or Options(), say, progress)
    real = evaluation.open(data)
    with_model = evaluation.load(model, "var", data)
    out = evaluation.begin(out, data, begun)
    produced = produce.generate_like(
        with_model, real, n, out / "notes", seed=evaluation.settings.seed, cfg=cfg, top_k=top_k, top_p=top_p,
        iterations=iterations, progress=evaluation.progress("generate"),
    )  # fmt: skip
    return evaluation.score_made(real, out, produced, with_model.config.audio)


def report_files(out: Path, profile: Profile) -> tuple[Path, Path]:
    """Return the paths of a profile's JSON and page, which lie beside those of the other profile."""
    stem = "report" if profile == "standard" else f"report-{profile}"
    return out / f"{stem}.json", out / f"{stem}.html"


class _Evaluation:
    """Everything about an evaluation but the two sets of notes, checked."""

    def __init__(self, mode: Mode, options: Options, say: Say | None, progress: Progress | None) -> None:
        self.options, self._progress = options, progress
        self.say: Say = say or log
        self.device = pick_device(options.device)
        self.settings = Settings(
            profile=options.profile,
            mode=mode,
            metrics=options.metrics,
            seed=options.seed,
            bins=options.bins,
            as_published=options.as_published,
        )
        self.networks = roles.load(
            options.preset or ("sony" if options.profile == "vinay2022" else "full"),
            roles=self.settings.roles,
            pitch=options.pitch_classifier,
            instrument=options.instrument_classifier,
            vggish_weights=options.vggish,
            framing="google" if options.profile == "standard" else "google-16-bit",
            crepe_size=options.crepe,
            device=self.device,
            force=options.force,
        )
        for network in self.networks.values():
            if isinstance(network, Classifier) and (below := network.below_gate):
                self.say(f"warning: {network.id}: {below}; taken because of `force`")
        if options.cache is not None and options.cache.exists() and not options.cache.is_dir():
            raise ConfigError(f"`cache` {options.cache} is not a folder; name another place, or keep no features")
        self.train = None if options.train is None else self.open(options.train, "train")
        check(self.settings, self.networks, self.train)

    def progress(self, what: str) -> Callable[[int, int], None] | None:
        """Return the callback (notes done, total) for the task `what`."""
        return None if self._progress is None else partial(self._progress, what)

    def open(self, path: Path | None, split: Split | None = None) -> NoteSet:
        """Open the notes in a folder or a packed dataset; None: the built-in ones."""
        progress = self.progress(f"read {'the built-in notes' if path is None else path}")
        return open_notes(path, split=split or self.options.split, allow_bad=self.options.allow_bad, progress=progress)

    def load(self, name: str | Path | None, stage: Literal["tokenizer", "var"], data: Path | None) -> Model:
        """The model; a warning where it is known to come from other notes than the built-in ones, taken for want of
        others.
        """
        model = load(name, self.device)
        if data is None and model.data.get(stage, built_in := open_dataset(None).fingerprint) != built_in:
            self.say(
                f"warning: {name} was not trained on the built-in notes, with which it is compared now; "
                "name its own real notes with `data`"
            )
        return model

    def begin(self, out: Path | None, data: Path | None, begun: Callable[[Path], None] | None) -> Path:
        """Create the folder for the notes to be made and for their reports, and check that it can be written."""
        place = out or Path("evaluations")
        if data is not None and place.resolve().is_relative_to(data.resolve()):
            raise ConfigError(
                f"`out` {place} is inside `data`, whose notes the new ones would join; name another folder"
            )
        out = out or new_folder(place, time.strftime("%Y%m%d-%H%M%S"))
        _writable(*report_files(out, self.options.profile))
        if begun is not None:
            begun(out)
        return out

    def score_made(self, real: NoteSet, out: Path, produced: dict[str, Any], audio: AudioConfig) -> Result:
        """Score the notes made in `out`, and write the reports there."""
        files = report_files(out, self.options.profile)
        return self.score(real, self.open(out / "notes"), *files, produced=produced, audio=audio)

    def score(
        self,
        real: NoteSet,
        fake: NoteSet,
        json_file: Path | None,
        html_file: Path | None,
        *,
        produced: dict[str, Any] | None = None,
        audio: AudioConfig | None = None,
    ) -> Result:
        """Evaluate two sets of notes and write the report."""
        evaluation = evaluate(
            real,
            fake,
            self.networks,
            self.settings,
            cache=self.options.cache,
            train=self.train,
            audio=audio,
            baselines=self.options.baselines,
            progress=self._progress,
            device=str(self.device),
            produced=produced,
        )
        if json_file is not None:
            report.write(json_file, evaluation.report)
        if html_file is not None:
            page.write(
                html_file, evaluation.report, [page.Pair(title, sounds) for title, sounds in evaluation.examples]
            )
        return Result(evaluation.report, tuple(file for file in (json_file, html_file) if file is not None))


def _writable(*files: Path | None) -> None:
    """Check that files can be written, before hours are spent on what goes into them."""
    for file in filter(None, files):
        if file.is_dir():
            raise ConfigError(f"{file} is a folder; name a file")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            probe(file.parent)
        except OSError as error:
            raise DiskError(f"{file.parent} cannot be written ({error.strerror}); name another place") from None
