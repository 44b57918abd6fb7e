"""Scores of a generated Chinese answer against its reference, in 0..1; an empty answer scores 0."""

import contextlib
import importlib.metadata
import sys

from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge import Rouge

_ROUGE = Rouge()
_SMOOTHING = SmoothingFunction().method1


def signature():
    """What the numbers mean: tokens, smoothing, averaging, library versions."""
    return (
        f"characters without blanks; BLEU-4 nltk {importlib.metadata.version('nltk')} sentence_bleu method1; "
        f"ROUGE rouge {importlib.metadata.version('rouge')} (sets of n-grams, summary-level L); "
        "attributes = share of the values in type#value*type#value questions that the answer contains; "
        "mean over rows; empty answer = 0; answers only"
    )


def score(prediction, reference, question=""):
    """{bleu-4, rouge-1-r/p/f, rouge-2-…, rouge-l-…, attributes} of one answer."""
    hypothesis, target = _tokens(prediction), _tokens(reference)
    scores = {"bleu-4": 0.0} | {f"rouge-{kind}-{stat}": 0.0 for kind in "12l" for stat in "rpf"}
    if hypothesis and target:
        scores["bleu-4"] = float(sentence_bleu([target], hypothesis, smoothing_function=_SMOOTHING))
        with _recursion(len(hypothesis) + len(target)):
            rouge = _ROUGE.get_scores(" ".join(hypothesis), " ".join(target))[0]
        scores |= {f"{kind}-{stat}": float(rouge[kind][stat]) for kind in rouge for stat in "rpf"}
    values = attribute_values(question)
    return scores | ({"attributes": sum(value in prediction for value in values) / len(values)} if values else {})


def average(scores):
    """The mean of each metric over the rows that have it."""
    names = list(dict.fromkeys(name for row in scores for name in row))
    columns = {name: [row[name] for row in scores if name in row] for name in names}
    return {name: sum(column) / len(column) for name, column in columns.items()}


def attribute_values(question):
    """The values asked for in ADVGEN's form, 类型#裙*颜色#黑色; [] for any other text."""
    pairs = [part.split("#") for part in question.strip().split("*")]
    return [value for _, value in pairs] if all(len(pair) == 2 and all(pair) for pair in pairs) else []


def _tokens(text):
    """Characters; a full stop of ASCII becomes a full-width one, because rouge would cut sentences at it."""
    return [char.replace(".", "．") for char in text if not char.isspace()]


@contextlib.contextmanager
def _recursion(depth):
    """rouge follows a common subsequence by recursion, one level a token."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, depth + 1000))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
