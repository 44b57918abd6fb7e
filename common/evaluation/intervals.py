"""How far a score would move on other rows of the same kind: 95 % intervals by resampling the rows."""

import numpy

from common.evaluation import metrics

RESAMPLES, CHUNK = 1000, 50


def intervals(scores, seed):
    """{metric: [low, high]} of the rows' scores (as metrics.score gives them): percentile bootstrap, 95 %.

    RESAMPLES times as many rows are drawn with replacement, and each metric is taken anew; one without a row to stand
    on is 0, as in metrics.average. The same seed and number of rows draw the same rows.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    return _bounds(_resampled(metrics.ratios(scores), len(scores), seed))


def change_intervals(base, tuned, seed):
    """{metric: [low, high]} of tuned minus base on the same rows in the same order, which are drawn together."""
    before = _resampled(metrics.ratios(base), len(base), seed)
    after = _resampled(metrics.ratios(tuned), len(tuned), seed)
    return _bounds({name: after[name] - before[name] for name in before if name in after})


def _resampled(ratios, count, seed):
    """{metric: its values in RESAMPLES resamples}."""
    if not ratios:
        return {}
    numerators, denominators = (numpy.stack(columns, axis=1) for columns in zip(*ratios.values(), strict=True))
    rng, parts = numpy.random.default_rng(seed), []
    for _ in range(RESAMPLES // CHUNK):
        times = rng.multinomial(count, numpy.full(count, 1 / count), size=CHUNK)
        above, below = times @ numerators, times @ denominators
        parts.append(numpy.divide(above, below, out=numpy.zeros_like(above), where=below > 0))
    return dict(zip(ratios, numpy.concatenate(parts).T, strict=True))


def _bounds(resampled):
    return {name: numpy.quantile(values, [0.025, 0.975]).tolist() for name, values in resampled.items()}
