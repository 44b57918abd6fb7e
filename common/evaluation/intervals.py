"""How far a score would move on other rows of the same kind: 95 % intervals by resampling the rows.

A ratio of sums is resampled by two products of matrices, for all metrics at once; scipy.stats.bootstrap calls a
function on copies of the rows instead, and takes eight times as long at 10,000 rows and 50 metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy

from common.evaluation import metrics

if TYPE_CHECKING:
    from numpy import ndarray

RESAMPLES = 1000
CHUNK = 50  # resamples made together: [CHUNK, rows] counts are in memory at once


def intervals(scores: Sequence[dict[str, Any]], seed: int) -> dict[str, list[float]]:
    """{metric: [low, high]} of the rows' scores (as metrics.score gives them): percentile bootstrap, 95 %.

    RESAMPLES times as many rows are drawn with replacement, and each metric is taken anew; one without a row to stand
    on is 0, as in metrics.average. The same seed and number of rows draw the same rows. A metric that one row alone has
    is left out: nothing says how it would move.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    return _bounds(_resampled(metrics.ratios(scores), len(scores), seed))


def change_intervals(
    base: Sequence[dict[str, Any]], tuned: Sequence[dict[str, Any]], seed: int
) -> dict[str, list[float]]:
    """{metric: [low, high]} of tuned minus base on the same rows in the same order, which are drawn together."""
    before = _resampled(metrics.ratios(base), len(base), seed)
    after = _resampled(metrics.ratios(tuned), len(tuned), seed)
    return _bounds({name: after[name] - before[name] for name in before if name in after})


def _resampled(ratios: dict[str, tuple[ndarray, ndarray]], count: int, seed: int) -> dict[str, ndarray]:
    """{metric: its values in the resamples, [RESAMPLES]} of `count` rows' numerators and denominators, [count] each.

    Metrics that one row alone has are left out.
    """
    ratios = {name: each for name, each in ratios.items() if count > 1 and numpy.count_nonzero(each[1]) != 1}
    if not ratios:
        return {}
    numerators, denominators = (numpy.stack(columns, axis=1) for columns in zip(*ratios.values(), strict=True))
    rng = numpy.random.default_rng(seed)
    parts = []
    for _ in range(RESAMPLES // CHUNK):
        times = rng.multinomial(
            count, numpy.full(count, 1 / count), size=CHUNK
        )  # [CHUNK, count]: how often each row is drawn
        above, below = times @ numerators, times @ denominators
        parts.append(numpy.divide(above, below, out=numpy.zeros_like(above), where=below > 0))
    return dict(zip(ratios, numpy.concatenate(parts).T, strict=True))


def _bounds(resampled: dict[str, ndarray]) -> dict[str, list[float]]:
    return {name: numpy.quantile(values, [0.025, 0.975]).tolist() for name, values in resampled.items()}
