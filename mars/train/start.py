"""Set up a run from the options of `mars-train`: settings, data, run folder; then hand over to the loop."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from mars import checkpoint, config, model, runtime
from mars.config import Config
from mars.data import Dataset, open_dataset
from mars.errors import ConfigError
from mars.train import folder, loop
from mars.train.stage import Stage
from mars.train.tokenizer import TokenizerStage
from mars.train.var import VARStage, tokenize

RUNS = Path("runs")
TOKENS = "tokens"  # in a VAR run: the tokens of its dataset, so that a resumed run need not make them again


def train_tokenizer(
    *,
    data: Path | None = None,
    preset: str | None = None,
    overrides: tuple[str, ...] = (),
    out: Path | None = None,
    resume: str = "auto",
    max_steps: int | None = None,
    max_time: str | None = None,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
) -> Path:
    """Train a tokenizer; returns the run folder.

    Raises:
        ConfigError, DataError, CheckpointError: something asked for cannot be used.
        Diverged, OSError: see `mars.train.loop.run`.
    """
    console, seconds, where = _prepare(max_time, device, threads)
    dataset = open_dataset(data)
    out = _resumed(out, resume)
    settings = _settings(out, preset, overrides, "tokenizer")
    _check_dataset(settings, dataset)
    stage = TokenizerStage(settings, dataset, where, seed)
    run = _open_run(out, "tokenizer", settings, dataset, seed, resume, stage, console)
    loop.run(stage, run, dataset.split("train"), seed=seed, max_steps=max_steps, max_time=seconds, console=console)
    console.print(f"next: mars-train var --tokenizer {run.path}")
    return run.path


def train_var(
    *,
    tokenizer: Path | None = None,
    data: Path | None = None,
    preset: str | None = None,
    overrides: tuple[str, ...] = (),
    out: Path | None = None,
    resume: str = "auto",
    max_steps: int | None = None,
    max_time: str | None = None,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
) -> Path:
    """Train a VAR on a tokenizer's tokens; returns the run folder.

    Raises:
        ConfigError, DataError, CheckpointError: something asked for cannot be used.
        Diverged, OSError: see `mars.train.loop.run`.
    """
    console, seconds, where = _prepare(max_time, device, threads)
    dataset = open_dataset(data)
    out = _resumed(out, resume)
    if tokenizer is None and out is not None and (out / "run.json").is_file():
        tokenizer = Path(checkpoint.read_json(out / "run.json")["tokenizer"])
    source = tokenizer or newest_tokenizer(preset)
    if tokenizer is None:
        console.print(f"tokenizer: {source} (the newest run; --tokenizer names another)")
    trained = model.load(source, where)
    settings = _var_settings(out, trained.config, preset, overrides, source)
    _check_dataset(settings, dataset)
    cached = None if out is None else out / TOKENS
    if cached is not None and cached.is_dir():
        checkpoint.verify(cached)
        tokens = checkpoint.read_tensors(cached / "ids.safetensors")["ids"]
    else:
        tokens = _tokens(trained, settings, dataset, where, console)
    stage = VARStage(settings, dataset, trained.tokenizer, tokens, where, seed)
    origin = {"tokenizer": str(source), "tokenizer_hash": trained.hash}
    run = _open_run(out, "var", settings, dataset, seed, resume, stage, console, origin)
    if not (run.path / TOKENS).exists():
        checkpoint.write_directory(run.path / TOKENS, {"ids": {"ids": tokens}}, {})
    loop.run(stage, run, dataset.split("train"), seed=seed, max_steps=max_steps, max_time=seconds, console=console)
    console.print(f"next: mars-generate -n 64 --model {run.path}")
    return run.path


def settings_of(
    stage: str,
    *,
    preset: str | None = None,
    overrides: tuple[str, ...] = (),
    out: Path | None = None,
    resume: str = "auto",
    tokenizer: Path | None = None,
) -> Config:
    """The settings that training `stage` would have with these options; without a tokenizer, a VAR's are the preset's.

    Raises:
        ConfigError, CheckpointError: something asked for cannot be used.
    """
    out = _resumed(out, resume)
    if tokenizer is None:
        return _settings(out, preset, overrides, stage)
    return _var_settings(out, config.load(model.locate(tokenizer) / "config.json"), preset, overrides, tokenizer)


def newest_tokenizer(preset: str | None = None) -> Path:
    """The newest tokenizer run under `runs/` that has a model, of `preset` if that is given.

    Raises:
        ConfigError: there is none.
    """
    found = []
    for path in RUNS.glob("*/run.json"):
        record = checkpoint.read_json(path)
        usable = record.get("stage") == "tokenizer" and (path.parent / "model" / "config.json").is_file()
        if usable and preset in (None, record.get("preset")):
            found.append((record.get("created", 0), path.parent))
    if not found:
        kind = f"tokenizer run of preset {preset}" if preset else "tokenizer run"
        raise ConfigError(
            f"there is no {kind} under {RUNS}/; train one first (mars-train tokenizer) or name it: --tokenizer PATH"
        )
    return max(found)[1]


def parse_time(text: str | None) -> float | None:
    """Seconds of "90s", "40m", "2h" or a plain number of seconds.

    Raises:
        ConfigError: it is none of these.
    """
    if text is None:
        return None
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], units[text[-1]]) if text and text[-1] in units else (text, 1)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = -1
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"--max-time: want a time such as 90s, 40m or 2h, got {text!r}")
    return seconds


def _prepare(max_time: str | None, device: str, threads: int | None) -> tuple[Console, float | None, torch.device]:
    if threads:
        torch.set_num_threads(threads)
    where = runtime.pick_device(device)
    if where.type == "cpu" and not runtime.native_bfloat16(where):
        # oneDNN instead of MKL, twice as fast on some CPUs and as exact; with bfloat16 units it would round to that.
        torch.set_float32_matmul_precision("medium")
    return Console(stderr=True, soft_wrap=True), parse_time(max_time), where


def _resumed(out: Path | None, resume: str) -> Path | None:
    """The run folder asked for, by --out or by --resume RUN."""
    if resume in ("auto", "never"):
        return out
    if not (Path(resume) / "run.json").is_file():
        raise ConfigError(f"--resume {resume}: not a run folder (no run.json); want auto, never or a run's path")
    if out is not None and out.resolve() != Path(resume).resolve():
        raise ConfigError(f"--out {out} and --resume {resume} name different runs; give one of them")
    return Path(resume)


def _settings(out: Path | None, preset: str | None, overrides: tuple[str, ...], stage: str) -> Config:
    if preset is None and not overrides and out is not None and (out / "config.json").is_file():
        return config.load(out / "config.json")
    return config.preset(preset or "notes", overrides, stage)


def _var_settings(
    out: Path | None, trained: Config, preset: str | None, overrides: tuple[str, ...], source: Path
) -> Config:
    """The tokenizer's settings, with those of the preset for the rest."""
    if preset is None and not overrides and out is not None and (out / "config.json").is_file():
        return config.load(out / "config.json")
    name = preset or trained.preset
    plain = config.preset(name) if preset or name in config.preset_names() else trained
    asked = config.override(plain, overrides, "var")
    fixed = [o.split(".")[0] for o in overrides if o.split(".")[0] in ("audio", "tokenizer")]
    if fixed:
        raise ConfigError(f"--set {fixed[0]}.…: the trained tokenizer {source} fixes these; set them when training it")
    if preset is not None and plain.tokenizer.scales != trained.tokenizer.scales:
        raise ConfigError(
            f"--preset {preset} does not fit the tokenizer {source}, which is of preset {trained.preset}; "
            "train one of that preset first or leave --preset out"
        )
    return dataclasses.replace(asked, audio=trained.audio, tokenizer=trained.tokenizer)


def _check_dataset(settings: Config, dataset: Dataset) -> None:
    if dataset.sample_rate != settings.audio.sample_rate:
        raise ConfigError(
            f"the dataset is at {dataset.sample_rate} Hz, audio.sample_rate is {settings.audio.sample_rate}; "
            "pack it again at that rate (mars-data … --sample-rate)"
        )
    if len(dataset.split("train")) == 0:
        raise ConfigError("the dataset has no training notes")


def _open_run(
    out: Path | None,
    stage_name: str,
    settings: Config,
    dataset: Dataset,
    seed: int,
    resume: str,
    stage: Stage,
    console: Console,
    origin: dict[str, Any] | None = None,
) -> folder.RunFolder:
    """Make the run folder, or check that an existing one is the same run."""
    path = out or RUNS / f"{stage_name}-{settings.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    record = {
        "stage": stage_name,
        "preset": settings.preset,
        "seed": seed,
        "data": dataset.fingerprint,
        "notes": len(dataset),
        "train_notes": len(dataset.split("train")),
        "created": time.time(),
        **(origin or {}),
    }
    if (path / "run.json").is_file():
        if resume == "never":
            raise ConfigError(f"--out {path} is a run already; name a new folder or leave out --resume never")
        known = checkpoint.read_json(path / "run.json")
        for key in ("stage", "preset", "seed", "data", "tokenizer_hash"):
            if known.get(key) != record.get(key):
                raise ConfigError(
                    f"--out {path} is a run with {key} {known.get(key)}, not {record.get(key)}; name a new folder"
                )
        if config.load(path / "config.json") != settings:
            raise ConfigError(
                f"--out {path} is a run with other settings; repeat its --set or name a new folder with --out"
            )
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"--out {path} exists and is not a run; name a new folder")
    size = sum(t.numel() * t.element_size() for group in stage.state().values() for t in group.values())
    runtime.free_space(path, 3 * (folder.KEEP + 1) * size)  # the optimiser's two moments come with the first step
    if not (path / "run.json").is_file():
        path.mkdir(parents=True, exist_ok=True)
        config.save(settings, path / "config.json")
        (path / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    count = sum(p.numel() for p in stage.model.parameters()) / 1e6
    notes = len(dataset.split("train"))
    console.print(
        f"{stage_name}: preset {settings.preset}, {count:.1f} M parameters, {notes:,} training notes, run {path}"
    )
    return folder.RunFolder(path)


def _tokens(
    trained: model.Model, settings: Config, dataset: Dataset, device: torch.device, console: Console
) -> torch.Tensor:
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("tokens", total=len(dataset))
        return tokenize(trained.tokenizer, settings, dataset, device, lambda n: progress.update(task, advance=n))
