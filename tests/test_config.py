"""Settings: presets, round trips, overrides, and what each wrong value is told."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mars import config
from mars.config import AudioConfig, Config, TokenizerConfig, TrainConfig, VARConfig, preset
from mars.errors import ConfigError


@pytest.mark.parametrize("name", config.preset_names())
def test_presets_survive_writing_and_reading(name, tmp_path):
    c = preset(name)
    assert c.preset == name
    values = config.to_dict(c)
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert config.from_dict(Config, values) == c
    config.save(c, tmp_path / "config.json")
    assert config.load(tmp_path / "config.json") == c


def test_presets_are_what_they_are_named_for():
    assert config.preset_names() == ["paper", "notes", "smoke", "truncated", "cmx"]
    paper = preset("paper")
    assert paper.audio.shape == (2, 256, 256)
    assert (paper.tokenizer.tokens, paper.tokenizer.latent, paper.patches) == (680, (16, 16), (16, 16))
    assert (paper.tokenizer.width, paper.tokenizer.depth, paper.tokenizer.heads) == (768, 12, 12)
    assert (paper.tokenizer.codebook_size, paper.tokenizer.code_dim, paper.tokenizer.beta) == (16_384, 32, 0.25)
    assert (paper.var.depth, paper.var.width, paper.var.heads, paper.var.condition) == (16, 1024, 16, ())
    assert paper.var.drop_path == pytest.approx(0.1 * 16 / 24)
    tokenizer, var = paper.train.tokenizer, paper.train.var
    assert (tokenizer.epochs, var.epochs) == (400, 350)
    assert (tokenizer.notes_per_step, var.notes_per_step) == (256, 768)
    assert (tokenizer.lr, tokenizer.lr_batch, tokenizer.discriminator_lr) == (3e-5, 128, 1e-4)
    assert (var.lr, var.lr_batch, var.schedule, var.weight_decay) == (8e-5, 256, "lin0", 0.05)
    assert (tokenizer.adversarial, tokenizer.adversarial_weight, tokenizer.adversarial_start) == (True, 0.5, 0.28)
    assert (tokenizer.adaptive_weight, tokenizer.discriminator_weight_decay) == (True, 5e-4)
    quantizer = paper.tokenizer
    assert (quantizer.kmeans_init, quantizer.ema_codebook, quantizer.restart_dead_codes) == (0, False, 0)
    assert preset("truncated").audio.shape == (1, 256, 256)
    assert preset("cmx").audio.shape == (4, 128, 128)
    lengths = []
    for name in ("truncated", "cmx"):  # patches and latent tokens that attend to each other
        c = preset(name)
        assert c.train.tokenizer.steps == 200_000
        lengths.append(c.patches[0] * c.patches[1] + c.tokenizer.latent[0] * c.tokenizer.latent[1])
    assert lengths == [512, 320]  # with DINOv2's class token, 513 and 321
    assert preset("notes").audio.shape == (32, 64, 64)


def test_what_a_stage_trains_with_unless_told_otherwise():
    """Presets and command lines leave these out and rely on them; the page on the paper has those of the models."""
    assert dataclasses.asdict(TrainConfig()) == {
        **{"steps": 1000, "epochs": 0.0, "batch_size": 16, "accumulate": 1, "patience": 0},
        **{"optimizer": "adamw", "lr": 1e-4, "lr_batch": 0, "warmup": 0.02, "final_lr": 0.02, "schedule": "cosine"},
        **{"weight_decay": 0.05, "betas": (0.9, 0.95), "grad_clip": 1.0, "ema": 0.999},
        **{"precision": "auto", "compile": "auto", "workers": 1, "checkpointing": False},
        **{"adversarial": False, "adversarial_weight": 0.5, "adversarial_start": 0.28, "adversarial_ramp": 0.02},
        **{"adaptive_weight": True, "discriminator_lr": 4e-4, "discriminator_warmup": 0.02},
        **{"discriminator_weight_decay": 5e-4, "log_every": 20, "validate_every": 500, "validate_notes": 256},
        **{"save_every": 500, "sample_every": 500, "keep": 3},
    }


def test_settings_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("smoke").audio.hop = 1


OVERRIDES = {
    "tokenizer.width=128": ("tokenizer", "width", 128),
    " tokenizer.width = 128 ": ("tokenizer", "width", 128),
    "tokenizer.layer_scale=1": ("tokenizer", "layer_scale", 1.0),
    "tokenizer.layer_scale=1e-3": ("tokenizer", "layer_scale", 1e-3),
    "tokenizer.metric=l2": ("tokenizer", "metric", "l2"),
    'tokenizer.metric="l2"': ("tokenizer", "metric", "l2"),
    "audio.cmx=4,2": ("audio", "cmx", (4, 2)),
    "audio.cmx=[4, 2]": ("audio", "cmx", (4, 2)),
    "audio.cmx=4": ("audio", "cmx", (4, 4)),
    "tokenizer.scales=1,2,4": ("tokenizer", "scales", ((1, 1), (2, 2), (4, 4))),
    "tokenizer.scales=[[1,1],[2,4],[4,8]]": ("tokenizer", "scales", ((1, 1), (2, 4), (4, 8))),
    "tokenizer.scales=1,[2,4],[4,8]": ("tokenizer", "scales", ((1, 1), (2, 4), (4, 8))),
    "tokenizer.scales=8": ("tokenizer", "scales", ((8, 8),)),
    "var.shared_adaln=false": ("var", "shared_adaln", False),
    "var.condition=pitch": ("var", "condition", ("pitch",)),
    "var.condition=pitch, family": ("var", "condition", ("pitch", "family")),
    "var.condition=['pitch', 'family']": ("var", "condition", ("pitch", "family")),
    "var.condition=[]": ("var", "condition", ()),
}


@pytest.mark.parametrize(("text", "wanted"), OVERRIDES.items(), ids=OVERRIDES)
def test_overrides(text, wanted):
    group, name, value = wanted
    extra = ("tokenizer.phi=1",) if "scales" in text else ()
    found = getattr(getattr(preset("smoke", (*extra, text)), group), name)
    assert found == value
    assert type(found) is type(value)


def test_overrides_apply_in_turn_and_leave_the_preset_alone():
    assert preset("smoke", ("tokenizer.width=32", "tokenizer.width=96")).tokenizer.width == 96
    assert preset("smoke").tokenizer.width == 64


def test_train_means_the_stage_at_hand():
    plain = preset("smoke").train
    c = preset("smoke", ("train.steps=7",), "var")
    assert (c.train.var.steps, c.train.tokenizer) == (7, plain.tokenizer)
    c = preset("smoke", ("train.steps=7", "train.var.steps=8"), "tokenizer")
    assert (c.train.var.steps, c.train.tokenizer.steps) == (8, 7)
    with pytest.raises(ConfigError, match=r"unknown setting train\.steps"):
        preset("smoke", ("train.steps=7",))


WRONG = {
    "tokenizer.widht=1": r"unknown setting tokenizer\.widht; did you mean tokenizer\.width\?",
    "tokenizr.width=1": r"unknown setting tokenizr; did you mean tokenizer\?",
    "tokenizer.zzz=1": r"unknown setting tokenizer\.zzz; known: patch, width",
    "train.var.stepz=1": r"did you mean train\.var\.steps\?",
    "tokenizer.width.x=1": r"unknown setting tokenizer\.width\.x",
    "tokenizer=1": "want KEY=VALUE with a key such as tokenizer.width, got 'tokenizer=1'",
    "tokenizer.width": "want KEY=VALUE",
    ".width=1": "want KEY=VALUE",
    "tokenizer.=1": "want KEY=VALUE",
    "tokenizer.width=64.0": r"tokenizer\.width must be an int, got 64\.0",
    "tokenizer.width=true": r"tokenizer\.width must be an int, got True",
    "tokenizer.width=wide": r"tokenizer\.width must be an int, got 'wide'",
    "tokenizer.width=0": r"tokenizer\.width must be positive, got 0",
    "tokenizer.heads=0": r"tokenizer\.heads must be positive, got 0",
    "tokenizer.heads=3": r"tokenizer\.width 64 is not a multiple of heads 3",
    "tokenizer.depth=0": r"tokenizer\.depth must be positive, got 0",
    "tokenizer.metric=l1": r"tokenizer\.metric must be one of cosine, l2; got 'l1'",
    "tokenizer.metric=1": r"tokenizer\.metric must be one of cosine, l2; got 1",
    "tokenizer.beta=nan": r"tokenizer\.beta must be finite, got nan",
    "tokenizer.beta=inf": r"tokenizer\.beta must be finite, got inf",
    "tokenizer.beta=1" + 400 * "0": r"tokenizer\.beta must be finite, got inf",
    "tokenizer.beta=x": r"tokenizer\.beta must be a float, got 'x'",
    "tokenizer.beta=false": r"tokenizer\.beta must be a float, got False",
    "tokenizer.codebook_size=1": r"codebook_size must be at least 2, got 1",
    "tokenizer.phi=4": r"tokenizer\.phi must be 1\.\.3 \(the number of scales\), got 4",
    "tokenizer.phi=0": r"tokenizer\.phi must be 1\.\.3",
    "tokenizer.dropout_start=4": r"dropout_start must be 1\.\.3 \(the number of scales\), got 4",
    "tokenizer.quantizer_dropout=1.5": r"quantizer_dropout must be in 0\.\.1, got 1\.5",
    "tokenizer.kmeans_init=-1": r"tokenizer\.kmeans_init must not be negative, got -1",
    "tokenizer.restart_dead_codes=2": r"tokenizer\.restart_dead_codes must be in 0\.\.1, got 2\.0",
    "tokenizer.codebook_decay=1": r"tokenizer\.codebook_decay must be in \[0, 1\), got 1\.0",
    "tokenizer.ema_codebook=1": r"tokenizer\.ema_codebook must be a bool, got 1",
    "tokenizer.drop_path=1": r"drop_path must be in \[0, 1\), got 1\.0",
    "tokenizer.scales=[]": r"tokenizer\.scales must name at least one",
    "tokenizer.scales=2,1,4": r"tokenizer\.scales must not shrink",
    "tokenizer.scales=0,1,4": r"tokenizer\.scales must be positive",
    "tokenizer.scales=[[1,1],[2,2,2],[4,4]]": r"tokenizer\.scales must have 2 values, got \[2, 2, 2\]",
    "tokenizer.scales=a,b": r"tokenizer\.scales must be a list, got 'a'",
    "tokenizer.patch=7": r"tokenizer\.patch \(7, 7\) must divide the grid \(64, 64\) that audio\.cmx \(8, 4\) gives",
    "tokenizer.patch=0": r"tokenizer\.patch \(0, 0\) must divide",
    "audio.cmx=5,4": r"audio\.cmx \(5, 4\) must divide \(bins, frames\) = \(512, 256\)",
    "audio.cmx=1,2,3": r"audio\.cmx must have 2 values, got \[1, 2, 3\]",
    "audio.cmx=a": r"audio\.cmx must be a list, got 'a'",
    "audio.cmx=1.5,2": r"audio\.cmx must be an int, got 1\.5",
    "audio.frames=10": r"audio\.frames 10 is too few for 64000 samples at hop 256; want at least 251",
    "audio.bins=513": r"audio\.bins must be 1\.\.512, got 513",
    "audio.hop=0": "audio: want even n_fft and 0 < hop",
    "audio.min_db=48": r"min_db 48\.0 is not below max_db 48\.0",
    "audio.min_db=-300": r"max_db at most 340 dB above, got -300\.0 and 48\.0",
    "audio.min_db=-500": r"want min_db within -400\.\.400",
    "audio.drop=ac": r"audio\.drop must be one of dc, nyquist",
    "var.condition=m/d": r"var\.condition must be of family, .* or the dataset's own labels; got 'm/d'",
    "var.condition=pitch,pitch": r"var\.condition names an attribute twice: pitch, pitch",
    "var.condition=3": r"var\.condition must be a str, got 3",
    "var.condition_dropout=-1": r"condition_dropout must be in 0\.\.1",
    "var.heads=5": r"var\.width 64 is not a multiple of heads 5",
    "train.var=3": r"train\.var is a group of settings, not a value; set train\.var\.<name>=",
    "train.var.epochs=-1": r"train\.epochs must not be negative, got -1\.0",
    "train.var.lr_batch=-1": r"train\.lr_batch must not be negative, got -1",
    "train.tokenizer.discriminator_weight_decay=-1": r"train\.discriminator_weight_decay must not be negative",
    "train.tokenizer.discriminator_warmup=2": r"train\.discriminator_warmup must be in 0\.\.1",
    "train.var.steps=0": r"train\.steps must be positive, got 0",
    "train.var.ema=1": r"train\.ema must be in \[0, 1\), got 1\.0",
    "train.var.betas=0.9": r"train\.var\.betas must be a list, got 0\.9",
    "train.var.betas=0.9,1.0": r"train\.betas must be in \[0, 1\)",
    "train.var.lr=-1": r"train\.lr must be positive",
    "train.var.warmup=2": r"train\.warmup must be in 0\.\.1",
    "train.var.grad_clip=-1": "grad_clip must not be negative",
    "train.var.schedule=step": r"train\.var\.schedule must be one of cosine, lin0",
    "train.var.precision=fp8": r"precision must be one of auto, float32, bfloat16",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=[t[:40] for t in WRONG])
def test_wrong_overrides_say_what_is_wanted(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        preset("smoke", (text,))
    assert "\n" not in str(caught.value)


LIMITS = (  # of preset `smoke`: the first or last value that is allowed, the next that is not
    ("tokenizer.codebook_size", 2, 1),
    ("tokenizer.depth", 1, 0),
    ("tokenizer.code_dim", 1, 0),
    ("tokenizer.phi", 1, 0),
    ("tokenizer.phi", 3, 4),
    ("tokenizer.dropout_start", 1, 0),
    ("tokenizer.dropout_start", 3, 4),
    ("tokenizer.phi_ratio", 0, -0.01),
    ("tokenizer.phi_ratio", 1, 1.01),
    ("tokenizer.quantizer_dropout", 0, -0.01),
    ("tokenizer.quantizer_dropout", 1, 1.01),
    ("tokenizer.restart_dead_codes", 0, -0.01),
    ("tokenizer.restart_dead_codes", 1, 1.01),
    ("tokenizer.kmeans_init", 0, -1),
    ("tokenizer.codebook_decay", 0, -0.01),
    ("tokenizer.codebook_decay", 0.999, 1),
    ("tokenizer.drop_path", 0, -0.01),
    ("tokenizer.drop_path", 0.999, 1),
    ("var.drop_path", 0, -0.01),
    ("var.drop_path", 0.999, 1),
    ("var.condition_dropout", 0, -0.01),
    ("var.condition_dropout", 1, 1.01),
    ("audio.min_db", -292, -293),  # 340 dB below max_db
    ("audio.min_db", 47.9, 48),
    ("audio.frames", 251, 250),  # the first holds exactly the samples
    ("audio.hop", 512, 513),
    ("train.var.epochs", 0, -0.01),
    ("train.var.lr_batch", 0, -1),
    ("train.var.steps", 1, 0),
    ("train.var.batch_size", 1, 0),
    ("train.var.keep", 1, 0),
    ("train.var.workers", 0, -1),
    ("train.var.sample_every", 0, -1),
    ("train.var.warmup", 0, -0.01),
    ("train.var.warmup", 1, 1.01),
    ("train.var.final_lr", 0, -0.01),
    ("train.var.final_lr", 1, 1.01),
    ("train.tokenizer.adversarial_start", 0, -0.01),
    ("train.tokenizer.adversarial_start", 1, 1.01),
    ("train.tokenizer.adversarial_ramp", 0, -0.01),
    ("train.tokenizer.adversarial_ramp", 1, 1.01),
    ("train.tokenizer.discriminator_warmup", 1, 1.01),
    ("train.tokenizer.discriminator_weight_decay", 0, -0.01),
    ("train.var.weight_decay", 0, -0.01),
    ("train.var.grad_clip", 0, -0.01),
    ("train.var.ema", 0, -0.01),
    ("train.var.ema", 0.9999, 1),
    ("train.var.betas", [0, 0.999], [0, 1]),
    ("train.var.betas", [0.9, 0], [0.9, -0.01]),
)


@pytest.mark.parametrize(("key", "allowed", "refused"), LIMITS, ids=lambda value: str(value))
def test_limits_belong_to_the_ranges(key, allowed, refused):
    more = ("audio.cmx=1", "tokenizer.patch=16,1") if key == "audio.frames" else ()  # any number of frames
    preset("smoke", (f"{key}={allowed}", *more))
    with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
        preset("smoke", (f"{key}={refused}", *more))


def test_grids_too_small_for_the_discriminator_are_refused():
    small = ("audio.cmx=32,1", "tokenizer.patch=16")
    assert preset("smoke", small).audio.shape == (32, 16, 256)
    with pytest.raises(ConfigError, match=r"wants a grid of 24 x 24 or more, audio\.cmx \(32, 1\) gives \(16, 256\)"):
        preset("smoke", (*small, "train.adversarial=true"), "tokenizer")


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ConfigError, match="unknown preset 'note'; known: paper, notes, smoke"):
        preset("note")


@given(st.text(max_size=20))
@settings(max_examples=30)
def test_no_override_text_raises_anything_else(text):
    for item in (
        text,
        f"tokenizer.width={text}",
        f"tokenizer.scales={text}",
        f"var.condition={text}",
        f"audio.{text}=1",
    ):
        with contextlib.suppress(ConfigError):  # any other error fails the test
            assert preset("smoke", (item,)).preset == "smoke"


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TrainConfig, {"precision": "half"}, "precision must be auto"),
        (TrainConfig, {"schedule": "flat"}, "schedule must be cosine or lin0"),
        (TokenizerConfig, {"metric": "dot"}, "metric must be cosine or l2"),
        (VARConfig, {"condition": ("m/d",)}, "must be of family, .*; got 'm/d'"),
        (AudioConfig, {"drop": "both"}, "drop must be dc or nyquist"),
        (AudioConfig, {"sample_rate": 0}, "must be positive"),
    ],
)
def test_constructors_check_as_well(kind, values, message):
    with pytest.raises(ConfigError, match=message):
        kind(**values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{", "cannot be read as JSON"),
        ("[1]", "must hold a JSON object"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("\xff", "cannot be read as JSON"),
        ("{}", r"preset is missing"),
        ('{"preset": 3}', "preset must be a str, got 3"),
        ('{"preset": "a", "audio": 3}', "audio is a group of settings"),
        ('{"preset": "a", "audio": {"hop": NaN}}', "NaN is no JSON number"),
        ('{"preset": "a", "tokenizer": {"beta": NaN}}', "NaN is no JSON number"),
        ('{"preset": "a", "tokenizer": {"beta": 1e999}}', "1e999 is too large a number"),
        ('{"preset": "a", "tokenizer": {"beta": null}}', r"tokenizer\.beta must be a float, got None"),
        ('{"preset": "a", "tokenizer": {"scales": null}}', r"tokenizer\.scales must be a list, got None"),
        ('{"preset": "a", "tokenizer": {"scales": {"a": 1}}}', r"tokenizer\.scales must be a list"),
        ('{"preset": "a", "audio": {"cmx": {"0": 1}}}', r"audio\.cmx must be a list"),
        ('{"preset": "a", "pickle": 1}', "unknown setting pickle; known: preset, audio"),
    ],
)
def test_files_that_cannot_be_used_are_refused(text, message, tmp_path):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message):
        config.load(path)


@pytest.mark.parametrize("name", config.preset_names())
def test_settings_as_toml_are_read_as_they_were(name, tmp_path):
    for overrides in ((), ("train.tokenizer.steps=7", "train.var.epochs=0.5", "tokenizer.width=96")):
        settings = config.preset(name, overrides)
        file = tmp_path / "settings.toml"
        file.write_text(config.as_toml(settings), encoding="utf-8")
        named, changes = config.read_settings(file)
        assert named == name
        assert config.preset(named, file=changes) == settings


@pytest.mark.parametrize("name", ["notes", "paper", "smoke"])
@pytest.mark.parametrize(
    ("rate", "seconds"), [(16_000, 4), (44_100, 4), (44_100, 10), (48_000, 1), (22_050, 3), (8_000, 4), (16_000, 4.096)]
)
def test_rate_and_length_are_followed(name, rate, seconds):
    plain = config.preset(name)
    fitted = config.fitted(plain, rate, round(rate * seconds))
    audio, tokenizer = fitted.audio, fitted.tokenizer
    assert (fitted == plain) == ((rate, seconds) == (16_000, 4))
    assert (audio.sample_rate, audio.samples) == (rate, round(rate * seconds))
    assert 0.7 < audio.hop / rate / (256 / 16_000) < 1.5  # a frame lasts about as long
    assert audio.shape[1] == plain.audio.shape[1]  # the grid has as many rows
    assert (audio.frames - 1) * audio.hop < audio.samples * 1.25
    assert len(tokenizer.scales) == len(plain.tokenizer.scales)
    assert [h for h, _ in tokenizer.scales] == [h for h, _ in plain.tokenizer.scales]
    assert tokenizer.scales[-1][1] == max(round(plain.tokenizer.scales[-1][1] * seconds / 4), 1)
    # A full-scale sine is as far below the loudest as before.
    assert audio.max_db - 20 * math.log10(audio.n_fft / 4) == pytest.approx(48 - 20 * math.log10(256))
