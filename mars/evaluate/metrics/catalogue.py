"""Which metrics there are: those of every file of this package that has `MEASURES`."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from mars.evaluate import metrics
from mars.evaluate.metrics.measure import Measure, Metric
from mars.evaluate.report import Heading


def measures() -> tuple[Measure, ...]:
    """Return the measures of all modules, in the order of their first metrics' places."""
    modules = [import_module(f"{metrics.__name__}.{info.name}") for info in pkgutil.iter_modules(metrics.__path__)]
    known = [measure for module in modules for measure in getattr(module, "MEASURES", ())]
    return tuple(sorted(known, key=lambda measure: measure.metrics[0].place))


def table() -> dict[str, Metric]:
    """Return all metrics by name, in the order of tables."""
    result = [metric for measure in measures() for metric in measure.metrics]
    return {metric.name: metric for metric in sorted(result, key=lambda metric: metric.place)}


def headings() -> dict[str, Heading]:
    """Return how a report shows the metrics, in the order of tables."""
    return {name: Heading(metric.label, metric.better) for name, metric in table().items()}
