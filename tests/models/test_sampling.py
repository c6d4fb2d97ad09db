"""Generation: bytes that depend on seed and index alone, guidance, filtering, conditions, errors."""

from __future__ import annotations

import threading

import pytest
import torch

from mars import audio, config
from mars.errors import CheckpointError, ConfigError
from mars.labels import condition_ids
from mars.model import Model, Timing
from mars.models import sampling
from mars.models.sampling import TILE, draw
from mars.models.tokenizer import Tokenizer
from mars.models.var import VAR

NOTES = [
    {"family": "brass", "source": "acoustic", "count": 8, "pitch": [42, 70]},
    {"family": "brass", "source": "synthetic", "count": 9, "pitch": [40, 78]},
    {"family": "flute", "source": "acoustic", "count": 16, "pitch": [58, 83]},
]


def tiny(*overrides: str) -> Model:
    """An untrained model whose tokens vary, and depend on its condition."""
    torch.manual_seed(1)
    settings = config.preset("smoke", overrides)
    var = VAR(settings.var, settings.tokenizer)
    with torch.no_grad():
        for p in var.parameters():
            p.mul_(3) if p.ndim == 1 else p.normal_(std=0.15)
    tokenizer = Tokenizer(settings).eval().requires_grad_(False)
    return Model(config=settings, tokenizer=tokenizer, var=var.eval().requires_grad_(False), notes=NOTES)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny()


def listed(model, n, **settings):
    return list(model.iterate(n, **{"iterations": 1, **settings}))


def identical(a, b):
    same = torch.equal(a.waveform, b.waveform) and torch.equal(a.log_magnitude, b.log_magnitude)
    return same and torch.equal(a.ids, b.ids) and (a.index, a.condition) == (b.index, b.condition)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_note_depends_on_seed_and_index_alone(precision):
    model = tiny()

    def listed(model, n, **settings):
        return list(model.iterate(n, **{"iterations": 1, "precision": precision, **settings}))

    notes = listed(model, 20)
    assert [note.index for note in notes] == list(range(20))
    assert len({tuple(note.ids.tolist()) for note in notes}) == 20
    for batch_size in (1, 3, 16, 2 * TILE + 1):
        assert all(map(identical, notes, listed(model, 20, batch_size=batch_size)))
    assert identical(listed(model, 1)[0], notes[0])
    assert all(map(identical, listed(model, 3, start=TILE - 1), notes[TILE - 1 :]))
    assert not identical(listed(model, 1, seed=1)[0], notes[0])


def test_notes_are_audible_and_at_most_full_scale(model):
    settings = model.config.audio
    for note in listed(model, 4, iterations=4):
        assert note.waveform.shape == (settings.samples,)
        assert note.log_magnitude.shape == (settings.bins, settings.frames)
        assert note.ids.shape == (model.config.tokenizer.tokens,)
        assert 1e-3 < note.waveform.abs().max() <= 1


def test_a_loud_note_is_made_quieter_not_clipped(model, monkeypatch):
    loud = 3 * torch.rand(TILE, model.config.audio.samples)
    monkeypatch.setattr(audio, "griffin_lim", lambda m, *_, **__: loud[: len(m)])
    for note, wave in zip(listed(model, 2), loud, strict=False):
        torch.testing.assert_close(note.waveform, wave / wave.max())


def test_progress_and_timing(model):
    seen, timing = [], Timing()
    listed(model, 11, start=3, batch_size=1, progress=lambda *p: seen.append(p), timing=timing)
    assert seen == [(5, 11), (11, 11)]
    assert min(timing.transformer, timing.decoding, timing.griffin_lim) > 0


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_tiles_side_by_side_have_the_bytes_of_one_thread(model, precision, threads, monkeypatch):
    seen, step = set(), model.var.step

    def spied(*arguments):
        seen.add((threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))
        return step(*arguments)

    monkeypatch.setattr(model.var, "step", spied)
    threads(1)
    alone = listed(model, 3 * TILE - 2, precision=precision)
    assert seen == {(threading.get_ident(), 1, False)}
    threads(3)
    seen.clear()
    timing = Timing()
    together = listed(model, 3 * TILE - 2, precision=precision, batch_size=1, timing=timing)
    assert all(map(identical, alone, together))
    assert {number for _, number, _ in seen} == {1}
    assert not any(grad for *_, grad in seen)
    assert threading.get_ident() not in {thread for thread, *_ in seen}
    assert torch.get_num_threads() == 3
    assert min(timing.transformer, timing.decoding, timing.griffin_lim) > 0


def test_a_large_transformer_has_all_threads_for_each_tile(model, threads, monkeypatch):
    threads(2)
    cpu = torch.device("cpu")
    assert sampling.workers(model.var, cpu) == 2
    assert sampling.workers(model.var, torch.device("cuda")) == 1
    monkeypatch.setattr(sampling, "MOST_ON_ONE_THREAD", 10)
    assert sampling.workers(model.var, cpu) == 1
    seen, step = set(), model.var.step
    monkeypatch.setattr(model.var, "step", lambda *a: seen.add(torch.get_num_threads()) or step(*a))
    listed(model, 1)
    assert seen == {2}


def test_notes_that_nobody_takes_are_not_made(model, threads, monkeypatch):
    threads(2)
    made, step = [], model.var.step
    monkeypatch.setattr(model.var, "step", lambda k, *a: made.append(k) or step(k, *a))
    notes = model.iterate(40 * TILE, batch_size=1)
    next(notes)
    notes.close()
    assert made.count(0) <= 8


def rows(model, monkeypatch):
    """The number of rows of every step from here on."""
    counts, step = [], model.var.step

    def spied(k, inputs, embedded, *rest):
        counts.append(len(embedded))
        return step(k, inputs, embedded, *rest)

    monkeypatch.setattr(model.var, "step", spied)
    return counts


def test_without_guidance_the_unconditional_half_is_not_run(model, monkeypatch):
    counts = rows(model, monkeypatch)
    listed(model, 1, cfg=0.0)
    assert set(counts) == {TILE}
    counts.clear()
    listed(model, 1, cfg=1.0)
    assert set(counts) == {2 * TILE}


def test_without_guidance_only_the_condition_counts(model, monkeypatch):
    def fail(*_):
        raise AssertionError

    plain = listed(model, 2, cfg=0.0)
    monkeypatch.setattr(model.var, "null_condition", fail)
    assert all(map(identical, plain, listed(model, 2, cfg=0.0)))


def test_guidance_grows_with_the_scale(model, monkeypatch):
    """The logits that are drawn from, against those of both halves by themselves."""
    halves, seen, step = [], [], model.var.step
    monkeypatch.setattr(
        model.var, "step", lambda *arguments: halves.append(step(*arguments).double()) or halves[-1].float()
    )
    monkeypatch.setattr(sampling, "draw", lambda logits, *rest: seen.append(logits) or draw(logits, *rest))
    listed(model, 1, cfg=3.0)
    assert len(seen) == 3
    for k, (both, used) in enumerate(zip(halves, seen, strict=True)):
        conditional, free = both.chunk(2)
        t = 3.0 * k / 2
        torch.testing.assert_close(used.double(), (1 + t) * conditional - t * free, rtol=1e-4, atol=1e-4)
        assert (conditional - free).abs().max() > 0.1


def test_a_model_without_condition_is_never_doubled(monkeypatch):
    model = tiny("var.condition=[]")
    counts = rows(model, monkeypatch)
    (note,) = listed(model, 1)
    assert set(counts) == {TILE}
    assert set(note.condition.values()) == {None}


@pytest.mark.parametrize("shared", ["true", "false"])
@pytest.mark.parametrize("condition", ['["pitch"]', "[]"])
def test_cached_logits_are_the_teacher_forced_ones(condition, shared, monkeypatch):
    model = tiny(f"var.condition={condition}", f"var.shared_adaln={shared}")
    logits, step = [], model.var.step
    monkeypatch.setattr(model.var, "step", lambda *arguments: logits.append(step(*arguments)) or logits[-1])
    notes = listed(model, TILE, cfg=0.0, precision="float32")
    ids = torch.stack([note.ids for note in notes])
    classes = condition_ids([note.condition for note in notes], model.config.var.condition)
    forced = model.var(model.tokenizer.quantizer.teacher_inputs(ids), classes)
    torch.testing.assert_close(torch.cat(logits, dim=1), forced, rtol=1e-4, atol=1e-4)


def naive_kept(logits, top_k, top_p):
    """Tokens that may be drawn, likeliest first, and their chances."""
    order = logits.argsort(descending=True)[:top_k].tolist()
    chances, kept = logits[order].double().softmax(0).tolist(), []
    while order and sum(chances[: len(kept)]) < top_p:
        kept.append(order.pop(0))
    total = sum(chances[: len(kept)])
    return kept, [chance / total for chance in chances[: len(kept)]]


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (5, 1.0), (99, 1.0), (99, 0.5), (6, 0.7), (6, 1e-6)])
def test_filtering_against_a_naive_reference(top_k, top_p):
    logits = 2 * torch.randn(1, 1, 12)
    kept, chances = naive_kept(logits[0, 0], top_k, top_p)
    uniforms = (torch.arange(20_000) + 0.5) / 20_000
    tokens = draw(logits.expand(1, len(uniforms), -1), uniforms[None], top_k, top_p)
    share = tokens.flatten().bincount(minlength=12) / len(uniforms)
    expected = torch.zeros(12)
    expected[kept] = torch.tensor(chances)
    torch.testing.assert_close(share, expected, rtol=0, atol=2e-4)


def test_the_largest_uniform_draws_a_kept_token():
    logits = torch.randn(1, 64, 300)
    tokens = draw(logits, torch.full((1, 64), 1 - 2**-24), 50, 0.9)
    for token, row in zip(tokens[0].tolist(), logits[0], strict=True):
        assert token in naive_kept(row, 50, 0.9)[0]


FLUTE = {"family": "flute", "source": "acoustic", "pitch": 61, "velocity": 100}
BRASS = {"family": "brass", "pitch": 50}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_note_depends_on_its_own_condition_alone(precision):
    model = tiny()

    def listed(model, n, **settings):
        return list(model.iterate(n, **{"iterations": 1, "precision": precision, **settings}))

    conditions = [FLUTE, BRASS, {}, *[FLUTE] * 5, BRASS, FLUTE]
    notes = listed(model, 10, conditions=conditions)
    assert notes[0].condition == FLUTE
    assert notes[1].condition == {"family": "brass", "source": None, "pitch": 50, "velocity": None}
    assert set(notes[2].condition.values()) == {None}
    assert all(map(identical, notes, listed(model, 10, conditions=conditions, batch_size=1)))
    assert all(map(identical, notes[1:3], listed(model, 2, start=1, conditions=conditions[1:3])))
    assert all(map(identical, notes[7:], listed(model, 3, start=7, conditions=conditions[7:])))
    others = listed(model, 10, conditions=[FLUTE, *[BRASS] * 9])
    assert identical(others[0], notes[0])
    assert identical(others[1], notes[1])
    assert not torch.equal(others[2].ids, notes[2].ids)
    assert not torch.equal(notes[3].ids, notes[4].ids)


def test_a_condition_that_is_given_counts_like_the_same_one_chosen(model):
    notes = listed(model, 3)
    again = listed(model, 2, start=1, conditions=[note.condition for note in notes[1:]])
    assert all(map(identical, notes[1:], again))


def test_conditions_that_the_model_lacks_are_ignored():
    model = tiny('var.condition=["pitch"]')
    nothing = {"family": None, "source": None, "velocity": None}
    (note,) = listed(model, 1, conditions=[{"family": "zzz", "source": "acoustic", "pitch": 60}])
    assert note.condition == {**nothing, "pitch": 60}
    (free,) = listed(tiny("var.condition=[]"), 1, conditions=[FLUTE])
    assert free.condition == {**nothing, "pitch": None}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conditions": [FLUTE], "pitch": 60}, "leave out family, source, pitch, velocity, instrument"),
        ({"conditions": []}, "want a condition for each of 1 notes, got 0"),
        ({"conditions": [FLUTE, FLUTE]}, "want a condition for each of 1 notes, got 2"),
        ({"conditions": [{"pitch": 128}]}, r"\{'pitch': 128\}: pitch .*must be 0..127"),
        ({"conditions": [{"pitch": (40, 50)}]}, r"pitch .*must be a whole number, 0..127, got \(40, 50\)"),
        ({"conditions": [{"pitch": 90}]}, "known to have 40-83; ask for one of these"),
        ({"conditions": [{**FLUTE, "source": "synthetic"}]}, r"source synthetic: .*\(flute\).* known to have acoustic"),
        ({"conditions": [60]}, "want a mapping of family, source, pitch, velocity, instrument as condition"),
        ({"conditions": [{"family": "vocal"}]}, "trained on none; it knows brass, flute"),
        ({"conditions": [{"family": "flut"}]}, "did you mean flute"),
        ({"conditions": [{"source": "electronic"}]}, "trained on none; it knows acoustic, synthetic"),
        ({"conditions": [{"velocity": 128}]}, "velocity must be"),
        ({"conditions": [{"tempo": 3}]}, "want family, source, pitch, velocity, instrument in a condition, got tempo"),
    ],
)
def test_mistaken_conditions_are_explained_at_once(model, settings, message):
    with pytest.raises(ConfigError, match=message):
        model.iterate(**{"n": 1, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"seed": -1}, "seed must be"),
        ({"start": -1}, "start must be"),
        ({"cfg": -0.1}, "cfg must be"),
        ({"cfg": float("nan")}, "cfg must be"),
        ({"top_k": 0}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"iterations": -1}, "iterations must be"),
        ({"pitch": 128}, "MIDI"),
        ({"pitch": (60, 48)}, "rising range"),
        ({"velocity": 128}, "velocity must be"),
        ({"family": "flut"}, "did you mean flute"),
        ({"family": "zzz"}, "known: bass"),
        ({"family": "vocal"}, "trained on none; it knows brass, flute"),
        ({"source": "acoustc"}, "did you mean acoustic"),
    ],
)
def test_mistakes_are_explained_at_once(model, settings, message):
    with pytest.raises(ConfigError, match=message):
        model.iterate(**{"n": 1, **settings})


def test_an_attribute_that_the_model_lacks():
    with pytest.raises(ConfigError, match="not trained with pitch"):
        tiny('var.condition=["family"]').iterate(1, pitch=60)


def test_a_tokenizer_alone_cannot_generate(model):
    with pytest.raises(CheckpointError, match="on it: `mars-train var`"):
        Model(config=model.config, tokenizer=model.tokenizer).iterate(1)


@pytest.mark.parametrize("part", ["var", "tokenizer"])
def test_numbers_that_are_not_finite_are_refused(part):
    model = tiny()
    getattr(model, part).head.bias.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        listed(model, 1)


def test_the_models_own_method(model):
    assert identical(model.generate(1, iterations=1)[0], listed(model, 1)[0])


def test_first_scales_are_kept_and_the_others_drawn(model):
    starts = model.config.tokenizer.starts
    (given,) = listed(model, 1, seed=5)
    for keep, start in enumerate(starts):
        tokens = given.ids[:start].expand(10, -1)
        notes = listed(model, 10, start=3, tokens=tokens, cfg=1.0)
        assert all(torch.equal(note.ids[:start], given.ids[:start]) for note in notes)
        assert len({tuple(note.ids.tolist()) for note in notes}) == (10 if keep < len(starts) - 1 else 1)
        assert identical(notes[7], listed(model, 1, start=10, tokens=tokens[:1], cfg=1.0)[0])
    assert torch.equal(notes[0].spectrogram(), given.spectrogram())


def test_the_scales_that_are_kept_may_be_none(model):
    none = torch.zeros(3, 0, dtype=torch.int64)
    assert all(map(identical, listed(model, 3), listed(model, 3, tokens=none)))


def test_a_low_temperature_takes_the_likeliest(model):
    likeliest = listed(model, 2, top_k=1)
    assert all(map(identical, likeliest, listed(model, 2, temperature=1e-6)))
    assert all(map(identical, listed(model, 2), listed(model, 2, temperature=1.0)))
    assert not identical(listed(model, 1)[0], listed(model, 1, temperature=5.0)[0])
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="temperature must be above 0"):
            model.generate(1, temperature=wrong)


@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (1,)])
def test_first_tokens_that_are_of_no_scale_are_refused(model, shape):
    with pytest.raises(ConfigError, match=r"tokens: want tokens \(1, one of 0, 1, "):
        model.generate(1, tokens=torch.zeros(shape, dtype=torch.int64))
