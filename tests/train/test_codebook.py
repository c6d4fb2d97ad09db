"""The codebook in training: its statistics, the three ways to keep it in use, and the alarm, on planted cases."""

from __future__ import annotations

import io
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.testing import assert_close

import mars
from mars.config import TokenizerConfig, TrainConfig, override
from mars.errors import CheckpointError
from mars.models.quantizer import Quantizer
from mars.runs.folder import RunFolder
from mars.runtime import stream
from mars.train import loop
from mars.train.codebook import EPSILON, KMEANS_ROUNDS, CodebookTraining
from mars.train.optimizer import Optimizer
from mars.train.tokenizer import TokenizerStage

CPU = torch.device("cpu")
SCALES = (1, 2, 4)
TOKENS, CODES, DIM = 21, 24, 6
METRICS = pytest.mark.parametrize("metric", ["cosine", "l2"])
YES, NO = torch.tensor(True), torch.tensor(False)


def make(tokens_per_step: int = TOKENS, train: TrainConfig | None = None, **settings) -> CodebookTraining:
    defaults = {"codebook_size": CODES, "code_dim": DIM, "phi": 1, "dropout_start": 1, "quantizer_dropout": 0.0}
    config = TokenizerConfig(scales=SCALES, **defaults | settings)
    torch.manual_seed(1)
    q, ema = Quantizer(config), Quantizer(config).requires_grad_(False)
    ema.load_state_dict(q.state_dict())
    return CodebookTraining(q, ema, Optimizer(q, train or TrainConfig(), ema), tokens_per_step)


def step(found: CodebookTraining, *latents: torch.Tensor, number: int = 0, finite=YES) -> list:
    """One step of these micro-batches; what the quantiser gave for each."""
    every = []
    for i, f in enumerate(latents):
        generator = stream(0, 1, number, i)
        every.append(found.quantizer.train()(f, generator))
        found.gather(every[-1], generator, (i, len(latents)))
    found.update(finite)
    return every


def latent(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, DIM, 4, 4, generator=torch.Generator().manual_seed(seed))


@METRICS
def test_residuals_are_what_the_codes_were_chosen_for(metric):
    found = make(metric=metric, restart_dead_codes=0.1)
    q = found.quantizer
    z = q.train()(latent(3))
    codes = q.codebook.detach()
    rows = z.residuals.flatten(0, 1)
    if metric == "cosine":
        best = (rows @ torch.nn.functional.normalize(codes, dim=1).T).argmax(1)
    else:
        best = torch.cdist(rows, codes).argmin(1)
    assert torch.equal(best, z.ids.flatten())
    assert q.eval()(latent(3)).residuals is None
    assert make().quantizer.train()(latent(3)).residuals is None  # nobody asked


@pytest.mark.parametrize("dropout", [0.0, 0.7])
def test_sums_over_tokens_are_those_of_a_plain_loop(dropout):
    found = make(ema_codebook=True, restart_dead_codes=0.1, quantizer_dropout=dropout)
    counts, sums = np.zeros((3, CODES), int), np.zeros((CODES, DIM))
    for i in range(2):
        generator = stream(0, i)
        z = found.quantizer.train()(latent(4, i), generator)
        found.gather(z, generator, (i, 2))
        kept = np.ones((4, 3), bool) if z.keep_mask is None else z.keep_mask.numpy()
        for b in range(4):
            for k, (start, end) in enumerate(pairwise(found.quantizer.starts)):
                for t in range(start, end):
                    if kept[b, k]:
                        counts[k, z.ids[b, t]] += 1
                        sums[z.ids[b, t]] += z.residuals[b, t].numpy()
    assert counts.sum() == (2 * 4 * TOKENS if dropout == 0 else counts.sum())
    assert (counts.sum() < 2 * 4 * TOKENS) == (dropout > 0)
    np.testing.assert_array_equal(found.gathered.counts, counts)
    np.testing.assert_allclose(found.gathered.sums, sums, atol=1e-5)


def test_candidates_are_residuals_of_the_batch_one_for_each_code():
    found = make(restart_dead_codes=0.1)
    rows = []
    for i in range(2):
        z = found.quantizer.train()(latent(4, i))
        found.gather(z, stream(0, i), (i, 2))
        rows.append(z.residuals.flatten(0, 1))
    for code, candidate in enumerate(found.gathered.candidates):
        matches = (rows[code % 2] == candidate).all(1)  # micro-batches take turns
        assert matches.any()
    assert len(found.gathered.candidates.unique(dim=0)) == CODES  # 84 rows each: nothing is offered twice


def test_few_tokens_are_offered_again():
    found = make(restart_dead_codes=0.1)
    z = found.quantizer.train()(latent(1))
    found.gather(z, stream(0), (0, 1))
    assert len(found.gathered.candidates.unique(dim=0)) == TOKENS  # of 24


class Summing:
    """Stands for the processes: does with each tensor what it is told to."""

    def __init__(self, act) -> None:
        self.all_reduce = act


@pytest.mark.parametrize("settings", [{"ema_codebook": True}, {"restart_dead_codes": 0.9}], ids=str)
def test_processes_that_share_the_micro_batches_of_a_step_agree(settings):
    settings = {"codebook_decay": 0.5, **settings}
    alone = make(**settings)
    ranks = [make(**settings) for _ in range(2)]
    for number in range(3):
        parts = [latent(2, 10 * number + i) for i in range(4)]
        step(alone, *parts, number=number)
        for r, rank in enumerate(ranks):
            for i in (2 * r, 2 * r + 1):
                generator = stream(0, 1, number, i)
                rank.gather(rank.quantizer.train()(parts[i], generator), generator, (i, 4))
        held = [[r.gathered.counts, r.gathered.sums, r.gathered.candidates] for r in ranks]
        wholes = [a + b for a, b in zip(*held, strict=True) if a is not None]
        for rank in ranks:
            left = iter(wholes)
            rank.world = Summing(lambda tensor, left=left: tensor.copy_(next(left)))
            rank.update(YES)
        assert torch.equal(ranks[0].quantizer.codebook, ranks[1].quantizer.codebook)
        assert_close(ranks[0].quantizer.codebook, alone.quantizer.codebook)
        for name, value in alone.state().items():
            assert_close(ranks[0].state()[name], value)
    assert not torch.equal(alone.quantizer.codebook, make(**settings).quantizer.codebook)


@METRICS
def test_codes_follow_the_mean_of_what_chooses_them(metric):
    """EnCodec's rule, written out in float64."""
    found = make(tokens_per_step=2 * 3 * TOKENS, metric=metric, ema_codebook=True, codebook_decay=0.8)
    codes = found.quantizer.codebook.detach().double().numpy()
    size = np.full(CODES, 2 * 3 * TOKENS / CODES)
    total = codes * size[:, None]
    for number in range(4):
        every = step(found, latent(3, number), latent(3, 50 + number), number=number)
        n, s = np.zeros(CODES), np.zeros((CODES, DIM))
        for z in every:
            np.add.at(n, z.ids.flatten().numpy(), 1)
            np.add.at(s, z.ids.flatten().numpy(), z.residuals.flatten(0, 1).double().numpy())
        size, total = 0.8 * size + 0.2 * n, 0.8 * total + 0.2 * s
        smooth = (size + EPSILON) / (size.sum() + CODES * EPSILON) * size.sum()
        np.testing.assert_allclose(found.quantizer.codebook, total / smooth[:, None], rtol=1e-4, atol=1e-5)
    assert np.abs(total / smooth[:, None] - codes).max() > 0.1


def test_the_gradient_then_trains_the_convolutions_alone():
    f = latent(3)
    losses = []
    for ema in (False, True):
        q = make(ema_codebook=ema).quantizer.train()
        q(f).loss.backward()
        losses.append((q.codebook.grad, q.phi_weight.grad))
    assert losses[0][0].any()
    assert losses[1][0] is None
    assert torch.equal(losses[0][1], losses[1][1])
    assert losses[1][1].any()


def test_the_averaged_model_follows_the_codebook_too(smoke, notes):
    c = override(smoke, ("train.steps=4", "tokenizer.ema_codebook=true", "tokenizer.codebook_decay=0.5"), "tokenizer")
    stage = TokenizerStage(c, notes, CPU, seed=0)
    average = stage.ema.quantizer.codebook.clone()
    for n in range(3):
        stage.step(n, [stage.batch(np.arange(4))], [stream(0, 1, n)])
        decay = min(c.train.tokenizer.ema, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * stage.model.quantizer.codebook
        assert_close(stage.ema.quantizer.codebook, average)


@pytest.mark.parametrize("ema", [False, True])
def test_dead_codes_start_anew_from_the_batch_and_others_do_not(ema):
    found = make(4 * TOKENS, restart_dead_codes=0.2, codebook_decay=0.5, ema_codebook=ema)
    q = found.quantizer
    far = slice(0, 8)
    with torch.no_grad():  # eight codes that nothing chooses
        q.codebook[far] = 0
        found.ema.codebook.copy_(q.codebook)
        found.total = q.codebook * found.size[:, None]
    for number in range(2):
        step(found, latent(4, number), number=number)
        assert not q.codebook[far].any()  # a quarter of the average is not dead yet
    (z,) = step(found, latent(4, 2), number=2)
    rows = z.residuals.flatten(0, 1)
    for code in q.codebook[far]:
        assert (rows == code).all(1).any()
    assert torch.equal(found.ema.codebook[far], q.codebook[far])
    assert_close(found.size[far], found.size[0].expand(8))
    assert found.size[0] == pytest.approx(found.size[8:].mean().item(), rel=0.5)
    used = z.ids.unique()
    assert not any((rows == code).all(1).any() for code in q.codebook[used])
    if ema:  # it goes on from its new place, not from its old one
        assert_close(found.total[far], q.codebook[far] * found.size[far, None])


def test_a_restarted_code_forgets_gradient_and_moments():
    found = make(restart_dead_codes=0.2, codebook_decay=0.0, train=TrainConfig(weight_decay=0.0))
    q, optimizer = found.quantizer, found.optimizer
    for number in range(3):
        f = latent(4, number)
        z = q.train()(f)
        z.loss.backward()
        q.codebook.grad += 1  # as though every code had been chosen
        found.gather(z, stream(0, number), (0, 1))
        before = q.codebook.detach().clone()
        found.update(YES)
        restarted = (q.codebook != before).any(1)
        assert restarted.any()
        assert not restarted.all()
        assert not q.codebook.grad[restarted].any()
        assert q.codebook.grad[~restarted].all()
        offered = q.codebook[restarted].clone()
        optimizer.update(number)
        moments = optimizer.state()
        for name in ("exp_avg", "exp_avg_sq"):
            assert not moments[f"quantizer.codebook/{name}".removeprefix("quantizer.")][restarted].any()
            assert moments["codebook/" + name][~restarted].all()
        assert torch.equal(q.codebook[restarted], offered)
        assert_close(found.ema.codebook[restarted], offered)


def test_restarts_raise_the_use_of_a_collapsed_codebook():
    used = {}
    for share in (0.0, 0.1):
        found = make(restart_dead_codes=share, codebook_decay=0.8, tokens_per_step=8 * TOKENS)
        with torch.no_grad():
            found.quantizer.codebook[1:] = -found.quantizer.codebook[0] * 1e-3  # two directions in all
        for number in range(20):
            (z,) = step(found, latent(8, number), number=number)
        used[share] = len(z.ids.unique())
    assert used[0.0] == 2
    assert used[0.1] > 0.8 * CODES


def test_a_step_that_is_not_finite_leaves_codes_and_statistics():
    found = make(restart_dead_codes=0.9, codebook_decay=0.1, ema_codebook=True)
    step(found, latent(2))
    before = {k: v.clone() for k, v in found.state().items()} | {"codes": found.quantizer.codebook.clone()}
    step(found, latent(2) * float("nan"), finite=NO)
    after = found.state() | {"codes": found.quantizer.codebook}
    assert [k for k, v in before.items() if not torch.equal(v, after[k])] == []


@METRICS
def test_kmeans_makes_codes_of_what_is_left_for_every_scale(metric):
    found = make(metric=metric, codebook_size=256)
    q, prototypes = found.quantizer, latent(10) + torch.linspace(-1, 1, DIM)[:, None, None]
    maps = {i: prototypes[torch.randint(10, (16,))] + latent(16, i) * 0.05 for i in range(8)}
    held_out = prototypes + latent(10, 99) * 0.05

    def errors() -> list[float]:
        _, totals = q.search(held_out)
        return [(t - held_out).square().mean().item() for t in totals]

    before = errors()
    found.start(maps, 8, seed=3)
    after = errors()
    assert after[-1] < 0.5 * before[-1]
    assert after[0] > after[1] > after[2]  # every scale still helps
    assert len(q.search(torch.cat(list(maps.values())))[0].unique()) > 0.8 * 256
    assert torch.equal(found.ema.codebook, q.codebook)
    again = make(metric=metric, codebook_size=256)
    again.start(maps, 8, seed=3)
    assert torch.equal(again.quantizer.codebook, q.codebook)
    again.start(maps, 8, seed=4)
    assert not torch.equal(again.quantizer.codebook, q.codebook)


def test_kmeans_finds_planted_clusters():
    q = Quantizer(TokenizerConfig(scales=(4,), codebook_size=24, code_dim=DIM, phi=1, dropout_start=1, phi_ratio=0.0))
    found = CodebookTraining(q, Quantizer(q.config), Optimizer(q, TrainConfig()), 16)
    centres = torch.randn(6, DIM) * 3
    which = torch.randint(6, (32, 4, 4))
    f = centres[which].permute(0, 3, 1, 2) + torch.randn(32, DIM, 4, 4) * 0.01
    found.start({0: f}, 1, seed=0)
    assert torch.cdist(centres, q.codebook).min(1).values.max() < 0.05


def test_kmeans_of_two_processes_is_that_of_one():
    maps = {i: latent(8, i) for i in range(4)}
    alone, ranks, rounds = make(), [make(), make()], []
    alone.world = Summing(lambda tensor: rounds.append(tensor.clone()))
    alone.start(maps, 4, seed=0)

    shares: list[torch.Tensor] = []  # what the first process has before each sum over both

    def leave(tensor):
        shares.append(tensor.clone())
        tensor.copy_(rounds[len(shares) - 1])

    def complete(tensor):
        whole = rounds.pop(0)
        assert_close(tensor + shares.pop(0), whole)
        tensor.copy_(whole)

    ranks[0].world, ranks[1].world = Summing(leave), Summing(complete)
    ranks[0].start({i: maps[i] for i in (0, 1)}, 4, seed=0)
    assert len(rounds) == len(shares) == 3 * (KMEANS_ROUNDS + 1)
    ranks[1].start({i: maps[i] for i in (2, 3)}, 4, seed=0)
    for rank in ranks:
        assert torch.equal(rank.quantizer.codebook, alone.quantizer.codebook)


def test_a_run_starts_from_the_latents_of_its_training_notes(smoke, notes):
    settings = ("tokenizer.kmeans_init=5", "train.steps=3", "train.batch_size=3")
    plain, ours, twin = (
        TokenizerStage(override(smoke, s, "tokenizer"), notes, CPU, seed=2) for s in (settings[1:], settings, settings)
    )
    weights = {k: v.clone() for k, v in ours.model.state_dict().items()}
    ours._start_codebook()
    changed = [k for k, v in ours.model.state_dict().items() if not torch.equal(v, weights[k])]
    assert changed == ["quantizer.codebook"]
    x = plain.batch(np.arange(8))
    error = {}
    for name, stage in (("plain", plain), ("ours", ours)):
        f = stage.ema.latent(x)
        error[name] = (stage.ema.quantizer.search(f)[1][-1] - f).square().mean()
    assert error["ours"] < 0.85 * error["plain"]
    batches = [twin.batch(np.arange(3))]
    twin.step(1, batches, [stream(0)])  # only the first step starts
    assert_close(twin.model.quantizer.codebook, weights["quantizer.codebook"], atol=0.1, rtol=0)
    ours.step(0, batches, [stream(0)])
    with pytest.raises(AssertionError):
        assert_close(ours.model.quantizer.codebook, weights["quantizer.codebook"], atol=0.1, rtol=0)


def report(found: CodebookTraining, counts: dict[int, list[int]]) -> tuple[dict, list[str]]:
    """A report in which scale k chose code i counts[k][i] times."""
    for k, row in counts.items():
        found.counts[k, : len(row)] += torch.tensor(row)
    messages: list[str] = []
    return found.report(messages.append), messages


def test_use_and_perplexity_per_scale():
    found, said = report(make(), {0: [3], 1: [2, 1, 1], 2: [10] * 20})
    assert found["train_codes_used"] == [1, 3, 20]
    assert found["train_perplexity"] == [1.0, 2.8, 20.0]
    assert (found["collapsed"], said) == ([], [])  # three tokens of one code mean nothing


def test_counts_are_those_since_the_last_report():
    tracker = make()
    step(tracker, latent(3), latent(3, 1))
    first, _ = report(tracker, {})
    assert sum(u > 0 for u in first["train_codes_used"]) == 3
    second, _ = report(tracker, {})
    assert second["train_codes_used"] == [0, 0, 0]
    assert second["train_perplexity"] == [1.0] * 3


def test_a_planted_collapse_is_warned_of_once_until_it_recovers():
    tracker = make()
    healthy, dead = [4] * CODES, [96]
    for counts, collapsed, warnings in (
        ({1: healthy, 2: healthy}, [], 0),
        ({1: dead, 2: healthy}, [1], 1),
        ({1: dead, 2: dead}, [1, 2], 1),
        ({1: healthy, 2: dead}, [2], 0),
        ({1: dead, 2: dead}, [1, 2], 1),
    ):
        found, said = report(tracker, counts)
        assert found["collapsed"] == collapsed
        assert len(said) == warnings
    assert said == [
        "warning: the 2x2 scale has collapsed: 1 codes in its last 96 tokens, perplexity 1.0; "
        "docs/training.md says what to do"
    ]


def test_use_that_falls_below_a_tenth_of_its_best_is_a_collapse():
    tracker = make(codebook_size=400)
    assert report(tracker, {2: [1] * 400})[0]["collapsed"] == []
    assert report(tracker, {2: [10] * 40})[0]["collapsed"] == []
    found, said = report(tracker, {2: [20] * 39})
    assert found["collapsed"] == [2]
    assert found["train_perplexity"][2] == 39.0
    assert "39 codes in its last 780 tokens" in said[0]
    # Judged by what it could use: few tokens can use few codes.
    assert report(make(codebook_size=400), {2: [1] * 64})[0]["collapsed"] == []
    few = make(codebook_size=400)
    few.load_state(tracker.state(), "f")
    assert report(few, {2: [1] * 64})[0]["collapsed"] == []
    assert report(few, {2: [20] * 39})[0]["collapsed"] == [2]  # the best is part of the state


def test_fewer_than_64_tokens_are_not_judged():
    assert report(make(), {0: [63]})[0]["collapsed"] == []
    assert report(make(), {0: [64]})[0]["collapsed"] == [0]
    assert report(make(codebook_size=2), {0: [32, 32]})[0]["collapsed"] == []


def test_a_run_whose_codebook_has_collapsed_says_so_and_goes_on(smoke, notes, tmp_path):
    settings = ("train.steps=6", "train.batch_size=8", "train.log_every=2", "train.validate_every=6", "train.lr=1e-9")
    stage = TokenizerStage(override(smoke, settings, "tokenizer"), notes, CPU, seed=0)
    with torch.no_grad():
        stage.model.quantizer.codebook[1:] = stage.model.quantizer.codebook[:1]
    output = io.StringIO()
    console = Console(file=output, width=200, soft_wrap=True)
    assert loop.run(stage, RunFolder(tmp_path), notes.split("train"), seed=0, console=console) == 6
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    logged = [line["collapsed"] for line in lines if "loss" in line]
    assert logged == [[2]] * 3  # the coarser scales have too few tokens, after quantiser dropout
    assert output.getvalue().count("has collapsed") == 1
    assert "warning: the 4x4 scale has collapsed: 1 codes in its last" in output.getvalue()


def test_statistics_that_do_not_fit_are_refused():
    state = make(ema_codebook=True).state()
    assert state.keys() == {"counts", "peak", "size", "total"}
    assert make().state().keys() == {"counts", "peak"}
    for other in (make(), make(restart_dead_codes=0.1), make(ema_codebook=True, codebook_size=8)):
        with pytest.raises(CheckpointError, match=r"f: codebook statistic .* is missing, unknown or has another shape"):
            other.load_state(state, "f")


def test_the_model_directory_is_the_same_with_and_without(smoke, notes, tmp_path):
    names = []
    for settings in ((), ("tokenizer.ema_codebook=true", "tokenizer.restart_dead_codes=0.1")):
        stage = TokenizerStage(override(smoke, (*settings, "train.steps=2"), "tokenizer"), notes, CPU, seed=0)
        stage.step(0, [stage.batch(np.arange(3))], [stream(0)])
        stage.snapshot().save(tmp_path / "model")
        loaded = mars.load(tmp_path / "model")
        assert torch.equal(loaded.tokenizer.quantizer.codebook, stage.ema.quantizer.codebook)
        names.append(list(loaded.tokenizer.state_dict()))
    assert names[0] == names[1]
