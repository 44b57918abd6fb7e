"""Scores of a generated Chinese answer against its reference, in 0..1; an empty answer scores 0.

nltk, rouge and sacrebleu compute them, imported with the first answer that is scored. rouge 1.0.1 is kept from three of
its faults: a full stop would cut a sentence, "." alone raises ValueError, and ROUGE-L needs gigabytes and fails by
recursion at some thousand characters. So its n-gram function is called directly, and the common subsequence is found
here, the one that rouge would choose.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import re
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy

if TYPE_CHECKING:
    from jieba import Tokenizer
    from numpy import ndarray
    from sacrebleu.metrics.chrf import CHRF

ENTITY = re.compile(r"(\S.*)_([^\W\d_]{1,10})")  # name_type; the type is a word
NO_ENTITY = "没有"
OVERLAPS = ("bleu-4", *(f"rouge-{kind}-{stat}" for kind in "12l" for stat in "rpf"))
NAMES = (*OVERLAPS, *(f"word-{name}" for name in OVERLAPS), "chrf", "exact", "distinct-2", "novel-f1", "looping")
PAIR = re.compile(r"[^*\s，。！？；：、]*[#＃][^*\s，。！？；：、]*")  # type#value, of the question or made up
MARKS = re.compile(r"[\s，。！？；：、]")  # between words: they say nothing
COPIED, COVERED = 0.8, 0.5  # a copy: so much of it stands in the question, and so much of the question in it
LOOPED = 20  # characters of the least loop


def signature() -> str:
    """What the numbers mean: tokens, smoothing, averaging, library versions."""
    versions = {name: importlib.metadata.version(name) for name in ("nltk", "rouge", "jieba")}
    return (
        f"characters without blanks, word-* jieba {versions['jieba']} words; "
        f"BLEU-4 nltk {versions['nltk']} sentence_bleu method1, below 1 for an equal answer of 3 tokens or fewer; "
        f"ROUGE rouge {versions['rouge']} (sets of n-grams, summary-level L; '.' is a token and cuts no sentence); "
        f"chrF sacrebleu {_chrf().get_signature()}; exact = the same text but for blanks at its ends; "
        "distinct-2 = different / all pairs of neighbouring characters within an answer; "
        "stopped = ended by itself with some text; "
        "novel-f1 = F1 of pairs of neighbouring characters, each as often as it stands there, without pairs of the "
        "question unless the reference has no others; "
        f"copied = {COPIED:.0%} of the answer's different pairs are in the question, {COVERED:.0%} of the question's "
        "in the answer, on rows whose reference is no such copy; "
        f"looping = ends with one piece, 3 times or more and {LOOPED} characters or more; "
        "attributes = share of the values in type#value*type#value questions that the answer contains, words with # "
        "left out, 0 where it loops; "
        "entity = exact name and type, sets of name_type lines, micro average; "
        "mean over rows; empty answer = 0; failed row = 0; answers only"
    )


def score(prediction: str, reference: str, question: str = "") -> dict[str, Any]:
    """{name: value} of one answer for all NAMES; copied, attributes or entities where the row has them.

    copied: of a row whose reference is no copy of its question.
    entities: {type: [right, predicted, expected]} of a row whose reference lists entities, or says there is none.
    """
    scores: dict[str, Any] = dict.fromkeys(NAMES, 0.0)
    characters = _characters(prediction), _characters(reference)
    if all(characters):
        scores |= _overlaps(*characters)
        words = _overlaps(_words(prediction), _words(reference))
        scores |= {f"word-{name}": value for name, value in words.items()}
        scores["chrf"] = _chrf().sentence_score(prediction, [reference]).score / 100
        scores["exact"] = float(prediction.strip() == reference.strip())
        scores["distinct-2"] = _distinct_pairs(characters[0])
        scores["novel-f1"] = novel_f1(prediction, reference, question)
        scores["looping"] = float(loops(prediction))
    if _pieces(question) and not copies(reference, question):
        scores["copied"] = float(copies(prediction, question))
    if attribute_values(question):
        scores["attributes"] = _named(prediction, question)
    if lists_entities(reference):
        scores["entities"] = _entity_counts(entities(prediction), entities(reference))
    return scores


def average(scores: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of each metric over the rows that have it; precision, recall and F1 of all entities, by type too."""
    return {name: float(_ratio(*map(numpy.sum, sums))) for name, sums in ratios(scores).items()}


def ratios(scores: Sequence[dict[str, Any]]) -> dict[str, tuple[ndarray, ndarray]]:
    """{metric: (numerators [N], denominators [N])} of N rows' scores: a metric is the sum of these by the sum of those.

    For a mean they are value and 1, or 0 and 0 where a row lacks the metric; entity metrics count entities.
    """
    names = [name for name in dict.fromkeys(name for row in scores for name in row) if name != "entities"]
    found = {
        name: (_column(row.get(name, 0.0) for row in scores), _column(name in row for row in scores)) for name in names
    }
    return found | _entity_ratios([row.get("entities", {}) for row in scores])


def _column(values: Iterable[Any]) -> ndarray:
    return numpy.array(list(values), dtype=float)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


def _overlaps(hypothesis: list[str], target: list[str]) -> dict[str, float]:
    """OVERLAPS of two lists of tokens, neither of them empty."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge.rouge_score import f_r_p_rouge_n, rouge_n

    smoothing = SmoothingFunction().method1
    scores = {"bleu-4": float(sentence_bleu([target], hypothesis, smoothing_function=smoothing))}
    for kind in (1, 2):
        found = rouge_n([" ".join(hypothesis)], [" ".join(target)], kind)
        scores |= {f"rouge-{kind}-{stat}": float(found[stat]) for stat in "rpf"}
    common = set(common_subsequence(target, hypothesis))
    found = f_r_p_rouge_n(len(set(hypothesis)), len(set(target)), len(common))
    return scores | {f"rouge-l-{stat}": float(found[stat]) for stat in "rpf"}


@functools.cache
def _chrf() -> CHRF:
    """sacrebleu's chrF; it knows its signature once it has scored."""
    from sacrebleu.metrics.chrf import CHRF

    scorer = CHRF()
    scorer.sentence_score("", [""])
    return scorer


def common_subsequence(left: Sequence[Hashable], right: Sequence[Hashable]) -> list[Any]:
    """A longest common subsequence of two lists of tokens, last token first: the one rouge 1.0.1 finds.

    Bit-parallel: each row of the table is one integer of len(right) bits, so 10,000 by 10,000 tokens take 12 MB and
    well under a second. A zero bit says that the length grows at this column
    (H. Hyyrö, Bit-parallel LCS-length computation revisited, AWOCA 2004).
    """
    places: dict[Hashable, int] = {}
    for number, token in enumerate(right):
        places[token] = places.get(token, 0) | 1 << number
    ones = (1 << len(right)) - 1
    row = ones
    rows = []
    for token in left:
        hits = row & places.get(token, 0)
        row = (row + hits | row - hits) & ones
        rows.append(row)
    found, i, j = [], len(left), len(right)
    while i and j:
        if left[i - 1] == right[j - 1]:
            found.append(left[i - 1])
            i, j = i - 1, j - 1
        elif rows[i - 1] >> (j - 1) & 1:
            j -= 1
        else:
            i -= 1
    return found


def _distinct_pairs(characters: Sequence[str]) -> float:
    """Different pairs of neighbours by all of them; 1 where one character has no neighbour to repeat."""
    pairs = list(zip(characters, characters[1:], strict=False))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def novel_f1(prediction: str, reference: str, question: str) -> float:
    """F1 of the pairs of neighbouring characters in answer and reference, each counted as often as it stands there.

    Pairs that stand in the question do not count, unless the reference has no others. Single characters are taken where
    the reference is one; blanks and Chinese marks are left out. 0 where the answer has no pair that counts.
    """
    size = 1 if len(MARKS.sub("", reference)) == 1 else 2
    said, expected, asked = (_pieces(text, size) for text in (prediction, reference, question))
    if expected.keys() - asked.keys():
        said, expected = (
            Counter({piece: count for piece, count in pieces.items() if piece not in asked})
            for pieces in (said, expected)
        )
    return _ratio(2 * (said & expected).total(), said.total() + expected.total())


def copies(text: str, question: str) -> bool:
    """Whether a text is its question over again, once or more often: COPIED and COVERED, of different pairs."""
    said, asked = _pieces(text).keys(), _pieces(question).keys()
    shared = len(said & asked)
    return shared > 0 and shared >= COPIED * len(said) and shared >= COVERED * len(asked)


def loops(text: str) -> bool:
    """Whether a text ends with the same piece three times or more, LOOPED characters in all or more; blanks aside."""
    text = "".join(_characters(text))
    return any(text.endswith(text[-size:] * max(3, -(-LOOPED // size))) for size in range(1, len(text) // 3 + 1))


def _pieces(text: str, size: int = 2) -> Counter[str]:
    """{piece of `size` characters: how often it stands in a text}; blanks and Chinese marks are left out."""
    text = MARKS.sub("", text)
    return Counter(text[start : start + size] for start in range(len(text) - size + 1))


def entities(text: str) -> set[tuple[str, str]]:
    """The set of (name, type) in an answer of `name_type` lines; lines of any other form are no entities."""
    found = (ENTITY.fullmatch(line.strip()) for line in text.splitlines())
    return {(match[1], match[2]) for match in found if match}


def lists_entities(text: str) -> bool:
    """Whether a reference is `name_type` lines and nothing else, or says that there is no entity."""
    lines = text.strip().splitlines()
    return lines == [NO_ENTITY] or bool(lines) and all(ENTITY.fullmatch(line.strip()) for line in lines)


def _entity_counts(predicted: set[tuple[str, str]], expected: set[tuple[str, str]]) -> dict[str, list[int]]:
    """{type: [right, predicted, expected]}."""
    kinds = sorted({kind for _, kind in predicted | expected})
    parts = (predicted & expected, predicted, expected)
    return {kind: [sum(entity[1] == kind for entity in part) for part in parts] for kind in kinds}


def _entity_ratios(rows: Sequence[dict[str, Sequence[int]]]) -> dict[str, tuple[ndarray, ndarray]]:
    """`ratios` of entity-p, entity-r, entity-f1 and entity-f1 TYPE; {} where no row expects an entity."""
    kinds = sorted({kind for row in rows for kind in row})
    counts = {kind: _column(row.get(kind, (0, 0, 0)) for row in rows).T for kind in kinds}
    right, predicted, expected = numpy.sum(list(counts.values()), axis=0) if counts else [_column([])] * 3
    if not expected.any():
        return {}
    found = {"entity-p": (right, predicted), "entity-r": (right, expected)}
    found["entity-f1"] = (2 * right, predicted + expected)
    expected_kinds = [kind for kind in kinds if counts[kind][2].any()]
    return found | {f"entity-f1 {kind}": (2 * counts[kind][0], sum(counts[kind][1:])) for kind in expected_kinds}


def attribute_values(question: str) -> list[str]:
    """The values asked for in ADVGEN's form, 类型#裙*颜色#黑色; [] for any other text."""
    pairs = [part.split("#") for part in question.strip().split("*")]
    return [value for _, value in pairs] if all(len(pair) == 2 and all(pair) for pair in pairs) else []


def _named(prediction: str, question: str) -> float:
    """The share of a question's attribute values that an answer names apart from type#value; 0 where it loops."""
    if loops(prediction):
        return 0.0
    own = PAIR.sub("*", prediction)
    values = attribute_values(question)
    return sum(value in own for value in values) / len(values)


def _characters(text: str) -> list[str]:
    return [char for char in text if not char.isspace()]


def _words(text: str) -> list[str]:
    return [word for word in _segmenter().lcut(text) if not word.isspace()]


@functools.cache
def _segmenter() -> Tokenizer:
    """jieba's segmenter with its own dictionary; silent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its regular expressions are no raw strings; some setuptools warn too
        import jieba
    jieba.setLogLevel(logging.WARNING)
    return jieba.Tokenizer()
