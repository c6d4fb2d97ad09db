"""Sets up a run (settings, data, run folder) and hands it to the loop."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from mars import checkpoint, config, labels, lock, model, runtime, terminal
from mars.config import Config
from mars.data import Dataset, open_dataset
from mars.errors import ConfigError, DiskError
from mars.files import new_folder, probe, write_atomically
from mars.labels import LABELS
from mars.runs import folder
from mars.runs.compare import RUNS
from mars.runs.distributed import World, join
from mars.runs.record import read_record
from mars.runs.samples import Sampler
from mars.runs.stage import StageName
from mars.runs.tensorboard import check_installed
from mars.runs.watch import Watch
from mars.train import loop
from mars.train.compiling import compile_blocks
from mars.train.profiling import profile_steps
from mars.train.tokenizer import TokenizerStage
from mars.train.tokens import cached_tokens, given_tokens
from mars.train.var import VARStage

ENDS = 3.0  # seconds of `max_time` for the start and the end of the process
TOKENS = ".tokens"  # beside the runs

Resume = Path | Literal["auto", "never"]


def train(
    stage_name: StageName,
    *,
    data: Path | None = None,
    preset: str | None = None,
    settings_file: Path | None = None,
    overrides: tuple[str, ...] = (),
    out: Path | None = None,
    resume: Resume = "auto",
    max_steps: int | None = None,
    max_time: float | None = None,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    tensorboard: bool = False,
    profile: Path | None = None,
    began: float | None = None,
    tokenizer: Path | None = None,
    tokens: Path | None = None,
    init: str | Path | None = None,
    shard: bool = False,
    next_command: Callable[[Path], str] | None = None,
    alone: bool = True,
    console: Console | None = None,
) -> Path:
    """Train a tokenizer, or a VAR on the tokens of one, and return the run folder.

    Args:
        settings_file: TOML that changes settings of the preset, and may name that; see `mars.config.read_settings`.
        overrides: settings to change after it, each as "KEY=VALUE".
        resume: "auto" resumes if `out` is a run, "never" refuses to; or the run folder to resume.
        max_time: seconds after which training stops, saved.
        profile: path at which to write a trace of a few steps instead of a run folder; it is returned.
        began: the `time.monotonic()` that `max_time` counts from; None: now.
        tokenizer: run or model that a VAR is trained on; None: that of `init`, or else the newest run.
        tokens: folder of the tokens of the dataset (`mars.data.tokens`), for a VAR; None: they are made, and kept.
        init: run, model or packaged model whose weights this stage starts from; None: random ones.
        shard: spread weights, averages and optimiser of a VAR over the processes instead of copying them to each.
        next_command: gives the command to type after the run at a path has ended, which is then printed.
        alone: whether to say how to go on after a stop.
        console: where messages go; None: to the logger `mars`.

    Raises:
        ConfigError, DataError, CheckpointError: an argument or a setting cannot be used, or the audio of the dataset is
            not what was packed.
        Diverged, OSError: see `mars.train.loop.run`.
    """
    if tensorboard:
        check_installed()
    began = time.monotonic() if began is None else began
    world = _prepare(device, threads)
    console = console or terminal.LogConsole()
    console.quiet = console.quiet or not world.main
    if profile is not None and world.size > 1:
        raise ConfigError("`profile` looks at one process; start it without torchrun")
    if shard and world.size == 1:
        raise ConfigError("`shard`: there is one process, nothing to spread a model over; start several with torchrun")
    dataset = open_dataset(data)
    out = _resumed(out, resume)
    notes = dataset.split("train")
    origin: dict[str, Any] = {}
    trained: model.Model | None = None
    init = _init(init, out)
    other = None if init is None else model.load(init, world.device)
    if other is not None:
        origin = {"init": str(init), "init_hash": other.hash}
    if stage_name == "tokenizer":
        if other is None:
            settings = _settings(out, preset, settings_file, overrides, stage_name, dataset)
        else:
            settings = _settings_on(out, other.config, preset, settings_file, overrides, init, stage_name)
    else:
        resumed = out is not None and (out / "run.json").is_file()
        if tokenizer is None and init is not None and not resumed:
            tokenizer = model.locate(init)
        named = None if settings_file is None else config.read_settings(settings_file)[0]
        source = _source(tokenizer, out, preset or named, console, world)
        trained = model.load(source, world.device)
        settings = _settings_on(out, trained.config, preset, settings_file, overrides, source, stage_name, other)
        if (problem := _other_data(trained, source, dataset, data)) is not None:
            if trained.data.get("tokenizer") is not None and not resumed and None in (data, tokenizer):
                raise ConfigError(
                    f"{problem}; name the dataset that it was trained on, or to train on others all the same, "
                    "both the data and the tokenizer"
                )
            console.print(f"warning: {problem}", markup=False)
        origin |= {"tokenizer": str(source), "tokenizer_hash": trained.hash}
    settings = settings.resolved(stage_name, len(notes))
    world.check(getattr(settings.train, stage_name))
    _check_dataset(settings, dataset, console.print)
    if stage_name == "var":
        _check_conditions(settings, dataset)
    if (stored := dataset.samples) != (expected := settings.audio.samples):
        change = "cut" if stored > expected else "padded with silence"
        rate = dataset.sample_rate
        console.print(f"the notes, of {stored / rate:.3g} s, are {change} to {expected / rate:.3g} s (audio.samples)")

    def make_stage() -> TokenizerStage | VARStage:
        _verify(dataset, console, world)
        stage: TokenizerStage | VARStage
        if trained is None:
            start = None if other is None else other.tokenizer
            stage = TokenizerStage(settings, dataset, world.device, seed, world, start)
        else:
            cache = (out.parent if out is not None else RUNS) / TOKENS
            if tokens is None:
                ids = _tokens(cache, trained, settings, dataset, console, world)
            else:
                ids = given_tokens(tokens, trained.tokenizer, settings, dataset)
            trained_on = trained.data.get("tokenizer")
            stage = VARStage(
                settings, dataset, trained.tokenizer, ids, world.device, seed, world, shard, trained_on, other
            )
        compile_blocks(stage, console.print)
        return stage

    if profile is not None:
        profile_steps(make_stage(), notes, seed=seed, device=world.device, out=profile, console=console)
        return profile
    origin["data_path"] = None if data is None else str(data.resolve())
    with _open_run(out, stage_name, settings, dataset, seed, resume, console, origin, world) as run:
        stage = make_stage()
        run.tokenizer_card = trained.card if trained is not None else ""
        if world.main:
            runtime.free_space(run.path, run.space_needed(stage))
        count = sum(p.numel() for p in stage.model.parameters()) / 1e6
        console.print(
            f"{stage_name}: preset {settings.preset}, {count:.1f} M parameters, {len(notes):,} training notes, "
            f"run {run.path}"
        )
        watch = Watch(
            run, stage.train, console.print, Sampler(stage, dataset, seed), device=world.device, tensorboard=tensorboard
        )
        loop.run(
            stage,
            run,
            notes,
            seed=seed,
            max_steps=max_steps,
            max_time=None if max_time is None else began + max_time - ENDS - time.monotonic(),
            console=console,
            names=dataset.names,
            watch=watch,
            alone=alone,
        )
    if watch.complete and next_command is not None:
        console.print(f"next: {next_command(run.path)}", markup=False)
    return run.path


def settings_of(
    stage_name: StageName,
    *,
    preset: str | None = None,
    settings_file: Path | None = None,
    overrides: tuple[str, ...] = (),
    out: Path | None = None,
    resume: Resume = "auto",
    tokenizer: Path | None = None,
    init: str | Path | None = None,
    data: Path | None = None,
) -> Config:
    """Return the settings that training would have with these options; without a tokenizer, a VAR's are the preset's.

    Raises:
        ConfigError, CheckpointError: an argument or a setting cannot be used.
    """
    out = _resumed(out, resume)
    source = init if tokenizer is None else tokenizer
    if source is None:
        dataset = None if data is None else open_dataset(data)
        return _settings(out, preset, settings_file, overrides, stage_name, dataset)
    other = None if init is None or stage_name == "tokenizer" else model.load(init)
    trained = config.load(model.locate(source) / "config.json")
    return _settings_on(out, trained, preset, settings_file, overrides, source, stage_name, other)


def words_of(settings: Config, data: Path | None) -> labels.Words:
    """Return the words of the open labels that a VAR with these settings would learn from a dataset, by label.

    The dataset is opened only where that matters: for an open condition, or any if `data` names one.

    Raises:
        DataError: the dataset cannot be opened.
    """
    attributes = settings.var.condition
    if not any(data is not None or labels.label(name).open for name in attributes):
        return {}
    dataset = open_dataset(data)
    return labels.vocabularies(attributes, dataset.labels(dataset.split("train")), dataset.words)


def newest_tokenizer(preset: str | None = None) -> Path:
    """Return the newest tokenizer run under `runs/` that has a model, of `preset` if that is given.

    Raises:
        ConfigError: there is none.
    """
    candidates = []
    for path in RUNS.glob("*/run.json"):
        try:
            record = read_record(path.parent)
        except ConfigError:  # one that is damaged does not keep anybody from the others
            continue
        exported = checkpoint.current(path.parent / "model") / "config.json"
        usable = record.stage == "tokenizer" and exported.is_file()
        if usable and preset in (None, record.preset):
            candidates.append((record.created, path.parent))
    if not candidates:
        kind = f"tokenizer run of preset {preset}" if preset else "tokenizer run"
        raise ConfigError(
            f"there is no {kind} under {RUNS}/; train one first (`mars-train tokenizer`) or name it with `tokenizer`"
        )
    return max(candidates)[1]


def _prepare(device: str, threads: int | None) -> World:
    runtime.set_threads(threads)
    where = runtime.pick_device(device)
    if where.type == "cpu" and not runtime.native_bfloat16(where):
        # oneDNN instead of MKL, twice as fast on some CPUs and as exact; with bfloat16 units it would round to that.
        torch.set_float32_matmul_precision("medium")
    return join(where)


def _resumed(out: Path | None, resume: Resume) -> Path | None:
    """Return the run folder that `out` or `resume` names."""
    if resume in ("auto", "never"):
        return out
    if not (Path(resume) / "run.json").is_file():
        raise ConfigError(f"`resume` {resume}: not a run folder (no run.json); want auto, never or a run's path")
    if out is not None and out.resolve() != Path(resume).resolve():
        raise ConfigError(f"`out` {out} and `resume` {resume} name different runs; give one of them")
    return Path(resume)


def _settings(
    out: Path | None,
    preset: str | None,
    file: Path | None,
    overrides: tuple[str, ...],
    stage: StageName,
    dataset: Dataset | None,
) -> Config:
    """Return the preset's, whose rate and length follow the dataset's unless the preset or somebody sets them.

    Presets are made for the rate and length of the built-in notes, which so need not be read: None.
    """
    if preset is None and file is None and not overrides and out is not None and (out / "config.json").is_file():
        return config.load(out / "config.json")
    named, changes = (None, {}) if file is None else config.read_settings(file)
    plain, usual = config.preset(preset or named or "notes"), config.AudioConfig()
    set_by_hand = "audio" in changes or any(override.strip().startswith("audio.") for override in overrides)
    if (
        dataset is not None
        and not set_by_hand
        and (plain.audio.sample_rate, plain.audio.samples) == (usual.sample_rate, usual.samples)
    ):
        plain = config.fitted(plain, dataset.sample_rate, dataset.samples)
    return config.override(plain, overrides, stage, changes)


def _init(init: str | Path | None, out: Path | None) -> str | Path | None:
    """Return what the weights start from: what is named, or what a run to go on with started from."""
    if init is None and out is not None and (out / "run.json").is_file():
        return read_record(out).init or None
    return init


def _source(tokenizer: Path | None, out: Path | None, preset: str | None, console: Console, world: World) -> Path:
    """Return the tokenizer to train on: the one named, else that of the run to go on with, else the newest run."""
    if tokenizer is None and out is not None and (out / "run.json").is_file():
        record = read_record(out)
        if record.stage != "var":
            raise ConfigError(f"`out` {out} is a run with stage {record.stage}, not var; name a new folder")
        tokenizer = Path(record.tokenizer)
    if tokenizer is not None:
        return tokenizer
    newest = Path(world.broadcast(str(newest_tokenizer(preset))))
    console.print(f"tokenizer: {newest} (the newest run; `tokenizer` names another)")
    return newest


def _settings_on(
    out: Path | None,
    trained: Config,
    preset: str | None,
    file: Path | None,
    overrides: tuple[str, ...],
    source: str | Path | None,
    stage: StageName,
    init: model.Model | None = None,
) -> Config:
    """Return the settings of the tokenizer in `source`, of the VAR of `init`, and the preset's for the rest."""
    if preset is None and file is None and not overrides and out is not None and (out / "config.json").is_file():
        return config.load(out / "config.json")
    named, changes = (None, {}) if file is None else config.read_settings(file)
    preset = preset or named
    name = preset or trained.preset
    plain = config.preset(name) if preset or name in config.preset_names() else trained
    if init is not None:
        plain = dataclasses.replace(plain, var=init.transformer.config)
    settings = config.override(plain, overrides, stage, changes)
    fixed = [o.split(".")[0] for o in overrides if o.split(".")[0] in ("audio", "tokenizer")]
    if fixed:
        raise ConfigError(
            f"`overrides` {fixed[0]}.…: the trained tokenizer {source} fixes these; set them when training it"
        )
    for part in ("audio", "tokenizer"):
        if part in changes and getattr(settings, part) != getattr(trained, part):
            raise ConfigError(
                f"`settings_file` {file}: its [{part}] is not that of the trained tokenizer {source}, which fixes it; "
                "leave that table out"
            )
    if preset is not None and settings.tokenizer.scales != trained.tokenizer.scales:
        raise ConfigError(
            f"`preset` {preset} does not fit the tokenizer {source}, which is of preset {trained.preset}; "
            "train one of that preset first or leave `preset` out"
        )
    if init is not None:
        _check_init(init.config, settings, trained)
    return dataclasses.replace(settings, audio=trained.audio, tokenizer=trained.tokenizer)


def _check_init(other: Config, asked: Config, trained: Config) -> None:
    """Raise `ConfigError` where the weights of a VAR cannot be those that another starts from."""
    for name in ("depth", "width", "heads", "shared_adaln"):
        if (had := getattr(other.var, name)) != (wanted := getattr(asked.var, name)):
            raise ConfigError(f"var.{name} {wanted}: the weights of `init` are of {had}, which they fix; leave it out")
    if set(other.var.condition) - set(asked.var.condition) or bool(other.var.condition) != bool(asked.var.condition):
        had = ", ".join(other.var.condition) or "none"
        raise ConfigError(f"var.condition: the conditions of `init` are {had}; keep them, and add others if you like")
    for name in ("scales", "codebook_size", "code_dim"):
        if getattr(other.tokenizer, name) != getattr(trained.tokenizer, name):
            raise ConfigError(
                f"`init` is for tokens of another tokenizer (tokenizer.{name} differs); name a `tokenizer` that was "
                "trained from that of `init`"
            )


def _other_data(trained: model.Model, source: Path, dataset: Dataset, data: Path | None) -> str | None:
    """Return the warning if the tokenizer was not trained on this dataset, or that is unknown; None: it was."""
    dataset_name = _called({"data": dataset.fingerprint, "data_path": data})
    trained_on = trained.data.get("tokenizer")
    if trained_on == dataset.fingerprint:
        return None
    if trained_on is None:
        return f"what the tokenizer {source} was trained on is not recorded; the VAR learns {dataset_name}"
    record = checkpoint.read_json(source / "run.json") if (source / "run.json").is_file() else None
    known = record if isinstance(record, dict) and record.get("data") == trained_on else {"data": trained_on}
    return f"the tokenizer {source} was trained on {_called(known)}, not on {dataset_name}"


def _called(record: Mapping[str, Any]) -> str:
    """Describe a dataset by what `run.json` says of it."""
    path = record.get("data_path")
    if path is None:
        path = "the built-in notes" if record.get("data") == open_dataset(None).fingerprint else "a dataset"
    return f"{path} (fingerprint {str(record.get('data'))[:12]})"


def _check_dataset(settings: Config, dataset: Dataset, say: Callable[[str], None]) -> None:
    if dataset.sample_rate != settings.audio.sample_rate:
        raise ConfigError(
            f"the dataset is at {dataset.sample_rate} Hz, audio.sample_rate is {settings.audio.sample_rate}; "
            "pack it again at that rate (`mars-data folder`), or train a tokenizer for it from nothing"
        )
    if len(dataset.split("train")) == 0:
        raise ConfigError("the dataset has no training notes")
    if len(dataset.split("valid")) == 0:
        say(
            "warning: the dataset holds no notes out, so that nothing is validated and no step is known as the best; "
            "to have that, pack it again with some notes held out"
        )


def _check_conditions(settings: Config, dataset: Dataset) -> None:
    known = (*LABELS, *dataset.own)
    for name in settings.var.condition:
        if name not in known:
            raise ConfigError(f"var.condition {name}: the dataset has no such label; it has {', '.join(known)}")


def _verify(dataset: Dataset, console: Console, world: World) -> None:
    """Verify the audio once on each machine; meanwhile the other processes are kept from timing out."""
    if world.first_here:
        with terminal.progress(console, transient=True) as tell:

            def report(done: int, size: int) -> None:
                tell("checking the audio (MB)", done // 10**6, size // 10**6)
                world.any(True)

            dataset.verify(report)
    while world.any(False):
        pass


@contextmanager
def _open_run(
    out: Path | None,
    stage_name: StageName,
    settings: Config,
    dataset: Dataset,
    seed: int,
    resume: Resume,
    console: Console,
    origin: dict[str, Any],
    world: World,
) -> Iterator[folder.RunFolder]:
    """Make the run folder, or check that an existing one is the same run, and keep it locked in the block.

    The main process does so for all.
    """
    name = f"{stage_name}-{settings.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = Path(world.broadcast(str(out or (new_folder(RUNS, name) if world.main else RUNS / name))))
    record = {
        "stage": stage_name,
        "preset": settings.preset,
        "seed": seed,
        "data": dataset.fingerprint,
        "notes": len(dataset),
        "train_notes": len(dataset.split("train")),
        "origin": {key: value for key, value in dataset.origin.items() if isinstance(value, str | int)},
        "created": time.time(),
        **origin,
    }
    identity = {key: record.get(key) for key in ("stage", "seed", "data", "tokenizer_hash", "init_hash")}
    run = folder.RunFolder(path, {**identity, "config": config.to_dict(settings)}, world)
    signature = json.dumps([run.identity, str(path)])
    if world.broadcast(signature) != signature:  # this waits for all to have read what the main process may write now
        raise ConfigError("started with other settings, data or `out` than process 0")
    if not world.main:
        world.barrier()
        yield run
        return
    # In this order: another trainer, which the lock is about to name, may write its run.json and the rest meanwhile.
    if path.exists() and not _abandoned(path) and not (path / "run.json").is_file():
        raise ConfigError(f"`out` {path} exists and is not a run; name a new folder")
    path.mkdir(parents=True, exist_ok=True)
    with lock.claim(path, console.print) as locked:
        if (path / "run.json").is_file():
            _check_run(path, record, settings, resume)
        if locked:
            run.recover()
        _probe(path)
        if not (path / "run.json").is_file():
            config.save(settings, path / "config.json")
            write_atomically(path / "run.json", (json.dumps(record, indent=1) + "\n").encode(), durable=True)
        world.barrier()
        yield run


def _abandoned(path: Path) -> bool:
    """Return whether a folder is empty, or was left by a trainer that was stopped before it wrote `run.json`."""
    if not path.is_dir():
        return False
    names = {p.name for p in path.iterdir()} - {lock.NAME, "config.json"}
    return all(name.startswith(".") and name.endswith(".tmp") for name in names)


def _check_run(path: Path, record: dict[str, Any], settings: Config, resume: Resume) -> None:
    """Raise `ConfigError` unless the run folder `path` is of this run and may be resumed."""
    if resume == "never":
        raise ConfigError(f"`out` {path} is a run already; name a new folder or leave out `resume` never")
    read_record(path)  # which sees that it is a record
    known = checkpoint.read_json(path / "run.json")
    if known.get("data") != record["data"]:
        raise ConfigError(
            f"{path} is a run on {_called(known)}, not on {_called(record)}; name that dataset, or a new folder"
        )
    for key in ("stage", "preset", "seed", "tokenizer_hash", "init_hash"):
        if known.get(key) != record.get(key):
            raise ConfigError(
                f"`out` {path} is a run with {key} {known.get(key)}, not {record.get(key)}; name a new folder"
            )
    recorded, requested = (config.to_dict(c) for c in (config.load(path / "config.json"), settings))
    if (other := folder.difference(recorded, requested, "config")) is not None:
        raise ConfigError(
            f"`out` {path} is a run with other settings: {other}; repeat its `overrides`, or name a new folder with "
            "`out`"
        )


def _probe(path: Path) -> None:
    try:
        probe(path)
    except OSError as error:
        raise DiskError(f"{path} cannot be written: {error.strerror or error}; name another `out`") from error


def _tokens(
    cache: Path, trained: model.Model, settings: Config, dataset: Dataset, console: Console, world: World
) -> torch.Tensor:
    done = 0

    def advance(notes: int) -> None:
        nonlocal done
        done += notes
        tell("tokens", done, len(dataset))

    with terminal.progress(console, unit="notes") as tell:
        return cached_tokens(
            cache,
            trained.tokenizer,
            settings,
            dataset,
            world,
            advance=advance,
            say=console.print,
        )
