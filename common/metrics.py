"""Scores of a generated Chinese answer against its reference, in 0..1; an empty answer scores 0."""

import contextlib
import importlib.metadata
import re
import sys

from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge import Rouge

ENTITY = re.compile(r"(\S.*)_([^\W\d_]{1,10})")  # name_type; the type is a word
NO_ENTITY = "没有"
_ROUGE = Rouge()
_SMOOTHING = SmoothingFunction().method1


def signature():
    """What the numbers mean: tokens, smoothing, averaging, library versions."""
    return (
        f"characters without blanks; BLEU-4 nltk {importlib.metadata.version('nltk')} sentence_bleu method1; "
        f"ROUGE rouge {importlib.metadata.version('rouge')} (sets of n-grams, summary-level L); "
        "attributes = share of the values in type#value*type#value questions that the answer contains; "
        "entity = exact name and type, sets of name_type lines, micro average; "
        "mean over rows; empty answer = 0; answers only"
    )


def score(prediction, reference, question=""):
    """{bleu-4, rouge-1-r/p/f, rouge-2-…, rouge-l-…} of one answer; attributes or entities where the row has them.

    entities: {type: [right, predicted, expected]} of a row whose reference lists entities, or says there is none.
    """
    hypothesis, target = _tokens(prediction), _tokens(reference)
    scores = {"bleu-4": 0.0} | {f"rouge-{kind}-{stat}": 0.0 for kind in "12l" for stat in "rpf"}
    if hypothesis and target:
        scores["bleu-4"] = float(sentence_bleu([target], hypothesis, smoothing_function=_SMOOTHING))
        with _recursion(len(hypothesis) + len(target)):
            rouge = _ROUGE.get_scores(" ".join(hypothesis), " ".join(target))[0]
        scores |= {f"{kind}-{stat}": float(rouge[kind][stat]) for kind in rouge for stat in "rpf"}
    if values := attribute_values(question):
        scores["attributes"] = sum(value in prediction for value in values) / len(values)
    if lists_entities(reference):
        scores["entities"] = _entity_counts(entities(prediction), entities(reference))
    return scores


def average(scores):
    """The mean of each metric over the rows that have it; precision, recall and F1 of all entities, by type too."""
    names = [name for name in dict.fromkeys(name for row in scores for name in row) if name != "entities"]
    columns = {name: [row[name] for row in scores if name in row] for name in names}
    means = {name: sum(column) / len(column) for name, column in columns.items()}
    return means | _entity_scores([row["entities"] for row in scores if "entities" in row])


def entities(text):
    """The set of (name, type) in an answer of `name_type` lines; lines of any other form are no entities."""
    found = (ENTITY.fullmatch(line.strip()) for line in text.splitlines())
    return {(match[1], match[2]) for match in found if match}


def lists_entities(text):
    """Whether a reference is `name_type` lines and nothing else, or says that there is no entity."""
    lines = text.strip().splitlines()
    return lines == [NO_ENTITY] or bool(lines) and all(ENTITY.fullmatch(line.strip()) for line in lines)


def _entity_counts(predicted, expected):
    """{type: [right, predicted, expected]}."""
    kinds = sorted({kind for _, kind in predicted | expected})
    parts = (predicted & expected, predicted, expected)
    return {kind: [sum(entity[1] == kind for entity in part) for part in parts] for kind in kinds}


def _entity_scores(rows):
    """{entity-p, entity-r, entity-f1, entity-f1 TYPE, …} over all rows' counts; {} where no row expects an entity."""
    totals = {}
    for row in rows:
        for kind, counts in row.items():
            totals[kind] = [total + count for total, count in zip(totals.get(kind, (0, 0, 0)), counts, strict=True)]
    right, predicted, expected = (sum(counts[part] for counts in totals.values()) for part in range(3))
    if not expected:
        return {}
    scores = {"entity-p": right / max(predicted, 1), "entity-r": right / expected}
    scores["entity-f1"] = 2 * right / (predicted + expected)
    kinds = sorted(kind for kind, counts in totals.items() if counts[2])
    return scores | {f"entity-f1 {kind}": 2 * totals[kind][0] / sum(totals[kind][1:]) for kind in kinds}


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
