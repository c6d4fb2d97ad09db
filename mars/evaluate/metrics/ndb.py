"""Number of statistically different bins (Richardson and Weiss 2018, arXiv:1805.12462) of flattened log-mels.

k-means on reference notes makes k bins. In each, the share p of n reference notes is compared with the share q of m
evaluated ones by a two-sided z-test of two proportions,

    z = (p - q) / sqrt(s (1 - s) (1 / n + 1 / m)),  s = (n p + m q) / (n + m),

and NDB / k is the share of bins with a p-value below alpha. Where the two sets have one distribution it is about
alpha, not 0; of real notes that the bins were not made from it is the floor, to be stated beside every value: NSynth's
splits differ in their instruments. The test's power grows with n and m: values of other sizes are not comparable. It
takes the two sets as independent: on reconstructions, which are paired with their originals, it rejects too rarely.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mars.errors import ConfigError, DataError, needed
from mars.evaluate.bootstrap import SEED
from mars.evaluate.metrics.measure import Measure, Metric, Row
from mars.evaluate.report import Figure
from mars.evaluate.samples import canonical_order, checked
from mars.runtime import stream

ALPHA = 0.05  # level of the test
COMPONENTS = 256  # principal components that the bins are made in
_FITTED = 4096  # notes that the components are made from
_CHUNK = 4096
_REFERENCE = 50_000  # training notes at most that bins are made of


@dataclass(frozen=True, slots=True)
class Bins:
    """One or more k-means clusterings of a reference set, each (k, e) in a projection x -> (x - mean) @ basis.T."""

    centres: Tensor  # (runs, k, e) float64
    counts: Tensor  # (runs, k) int64, reference notes of each bin
    projection: tuple[Tensor, Tensor] | Tensor  # mean (d,) and basis (e, d), or the indices (e,) of dimensions
    features: int  # d
    explained: float  # share of the reference set's variance that the projection keeps

    @property
    def reference(self) -> int:
        """Number of reference notes."""
        return int(self.counts[0].sum())


@dataclass(frozen=True, slots=True)
class NDB:
    """NDB / k and Jensen-Shannon divergence (nats): means and sample standard deviations over the clusterings."""

    ratio: float
    ratio_std: float
    divergence: float
    divergence_std: float
    ratios: tuple[float, ...]
    bins: int
    reference: int
    notes: int


def fit_bins(reference: Tensor, k: int = 100, *, runs: int = 5, seed: int = SEED) -> Bins:
    """Cluster reference notes (n, d) into k bins `runs` times, each from a seed of its own, whatever their order.

    Where d is above COMPONENTS the clusters are made in that many principal components, computed from 4096 of the
    notes at most: k-means in the 20,080 dimensions of a log-mel is slow, and noise in most of them. Each run starts
    once from k-means++ and does 100 iterations at most, on one thread, because how several add up is not determined.

    Raises:
        ValueError: another shape.
        DataError: fewer notes, or fewer different ones, than bins; notes that are not finite.
        MissingPackage: scikit-learn is not installed.
    """
    reference = checked("fit_bins", reference, "notes", "features", minimum=max(k, 2))
    order = canonical_order(reference)
    projection, explained = _principal(reference[order[_choice(len(order), _FITTED, seed)]], seed)
    samples = _project(reference, projection)[order]
    clusterings = [_kmeans(samples, k, starts=1, seed=_integer(seed, 1 + run)) for run in range(runs)]
    centres, labels = (torch.stack(x) for x in zip(*clusterings, strict=True))
    counts = torch.stack([x.bincount(minlength=k) for x in labels])
    return Bins(centres, counts, projection, reference.shape[1], explained)


def fit_bins_vinay2022(reference: Tensor, k: int = 100, *, seed: int = SEED) -> Bins:
    """Return the published program's clustering of reference notes (n, d) into k bins, in the order of the files.

    Above 1000 dimensions it works on d // 6 of them, drawn at random (by us with a seed, by the program without);
    ten starts of k-means++, the best kept; a bin's centre is the mean of the notes labelled with it.

    Raises:
        ValueError: another shape.
        DataError: fewer notes, or fewer different ones, than bins; notes that are not finite.
        MissingPackage: scikit-learn is not installed.
    """
    reference = checked("fit_bins_vinay2022", reference, "notes", "features", minimum=max(k, 2))
    d = reference.shape[1]
    dimensions = _choice(d, d // 6 if d > 1000 else d, seed)
    samples = _project(reference, dimensions)
    _, labels = _kmeans(samples, k, starts=10, seed=_integer(seed, 1))
    members = torch.nn.functional.one_hot(labels, k).double()
    counts = members.sum(0)
    centres = members.T @ samples / counts[:, None]
    explained = float(samples.var(0).sum() / reference.var(0).double().sum())
    return Bins(centres[None], counts.long()[None], dimensions, d, explained)


def different_bins(bins: Bins, notes: Tensor, alpha: float = ALPHA) -> NDB:
    """Compute NDB / k and Jensen-Shannon divergence of notes (m, d) against the bins, averaged over the clusterings.

    Raises:
        ValueError: another shape than the reference's.
        DataError: no notes, or notes that are not finite.
    """
    notes = checked("different_bins", notes, "notes", "features")
    if notes.shape[1] != bins.features:
        raise ConfigError(f"different_bins: want {bins.features} features as the bins have, got {notes.shape[1]}")
    samples = _project(notes, bins.projection)
    k = bins.counts.shape[1]
    labels = [torch.cdist(samples, centres).argmin(1) for centres in bins.centres]
    counts = torch.stack([x.bincount(minlength=k) for x in labels])
    ratios = (p_values(bins.counts, counts) < alpha).double().mean(1)
    divergences = jensen_shannon(bins.counts, counts)
    several = len(ratios) > 1
    return NDB(
        ratio=float(ratios.mean()),
        ratio_std=float(ratios.std()) if several else 0.0,
        divergence=float(divergences.mean()),
        divergence_std=float(divergences.std()) if several else 0.0,
        ratios=tuple(ratios.tolist()),
        bins=k,
        reference=bins.reference,
        notes=len(notes),
    )


def p_values(counts_a: Tensor, counts_b: Tensor) -> Tensor:
    """Return each bin's p-value of a two-sided z-test, float64 (..., k), of counts (..., k); 1 where both are empty."""
    a, b = counts_a.double(), counts_b.double()
    n, m = a.sum(-1, keepdim=True), b.sum(-1, keepdim=True)
    pooled = (a + b) / (n + m)
    error = (pooled * (1 - pooled) * (1 / n + 1 / m)).sqrt()
    z = torch.where(error > 0, (a / n - b / m) / error, 0.0)
    return torch.special.erfc(z.abs() / 2**0.5)


def jensen_shannon(counts_a: Tensor, counts_b: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence (...,), in nats, of the proportions in counts (..., k)."""
    p, q = (x.double() / x.sum(-1, keepdim=True) for x in (counts_a, counts_b))
    middle = (p + q) / 2
    entropy = torch.special.entr
    return (entropy(middle) - (entropy(p) + entropy(q)) / 2).sum(-1)


def _kmeans(samples: Tensor, k: int, *, starts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return centres (k, e) and labels (n,) of samples (n, e)."""
    with needed("NDB", "scikit-learn"):
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            fit = KMeans(k, n_init=starts, max_iter=100, random_state=seed).fit(samples.numpy())
        except ConvergenceWarning:
            distinct = len(np.unique(samples.numpy(), axis=0))
            raise DataError(
                f"NDB: want at least {k} different reference notes, got {distinct}; use more, or fewer bins"
            ) from None
    return torch.from_numpy(fit.cluster_centers_), torch.from_numpy(fit.labels_).long()


def _principal(samples: Tensor, seed: int) -> tuple[tuple[Tensor, Tensor] | Tensor, float]:
    """Project samples (n, d) on COMPONENTS principal components; and the share of variance that these keep."""
    n, d = samples.shape
    if d <= COMPONENTS:
        return torch.arange(d), 1.0
    with needed("NDB", "scikit-learn"):
        from sklearn.decomposition import PCA
    pca = PCA(min(COMPONENTS, n - 1), svd_solver="randomized", random_state=_integer(seed, 0))
    with np.errstate(invalid="ignore"):  # notes that are all alike, which are refused when there are no bins of them
        pca.fit(samples.numpy())
    return (torch.from_numpy(pca.mean_), torch.from_numpy(pca.components_)), float(pca.explained_variance_ratio_.sum())


def _project(samples: Tensor, projection: tuple[Tensor, Tensor] | Tensor) -> Tensor:
    """Return float64 (n, e) of samples (n, d)."""
    if isinstance(projection, Tensor):
        return samples[:, projection].double()
    mean, basis = projection
    return torch.cat([((x.to(mean.dtype) - mean) @ basis.T).double() for x in samples.split(_CHUNK)])


def _choice(n: int, size: int, seed: int) -> Tensor:
    """Return `min(n, size)` different indices below n."""
    return torch.randperm(n, generator=stream(seed))[:size]


def _integer(seed: int, key: int) -> int:
    """Return a seed for scikit-learn."""
    return int(torch.randint(2**31, (), generator=stream(seed, 1, key)))


def _bins(row: Row) -> Bins:
    """Return those of the training notes (of _REFERENCE of them at most, whatever their order), or of the real ones."""
    conditions, train = row.conditions, row.train
    fit = fit_bins if conditions.profile == "standard" else fit_bins_vinay2022

    def fitted(log_mel: Tensor) -> Bins:
        return fit(log_mel.flatten(1), conditions.bins, seed=conditions.seed)

    if train is None:
        return row.real.once("ndb_k", lambda: fitted(row.real.log_mel))
    order = np.argsort(np.array(train.notes.keys))
    chosen = _choice(len(order), _REFERENCE, conditions.seed).numpy()
    return train.once("ndb_k", lambda: fitted(train.log_mel_of(order[np.sort(chosen)])))


def _ndb(row: Row) -> dict[str, Figure]:
    reference, k = row.train or row.real, row.conditions.bins
    if len(reference) < k:
        raise DataError(f"want a note or more for each of {k} bins, got {len(reference)}; have fewer `bins`")
    bins = _bins(row)
    result = different_bins(bins, row.fake.log_mel.flatten(1))
    details = {
        "std": result.ratio_std, "clusterings": list(result.ratios),
        "jensen_shannon": result.divergence, "jensen_shannon_std": result.divergence_std, "explained": bins.explained,
    }  # fmt: skip
    if row.train is not None:
        details["floor"] = different_bins(bins, row.real.log_mel.flatten(1)).ratio  # of the real notes
    params = {
        "k": result.bins, "alpha": ALPHA, "runs": len(result.ratios), "features": bins.centres.shape[2],
        "reference": "real" if row.train is None else "train", "n_reference": result.reference,
    }  # fmt: skip
    return {"ndb_k": Figure(value=result.ratio, params=params, details=details)}


MEASURES = (
    Measure(
        metrics=(Metric("ndb_k", "NDB/k", -1, 10),),
        compute={"standard": _ndb, "vinay2022": _ndb},
        training="used",
    ),
)
