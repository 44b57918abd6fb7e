"""Kinds of defects that leave a row out: what `--check` calls each, what it expects instead, and the remedy."""

import re
from functools import lru_cache
from typing import NamedTuple


class Defect(NamedTuple):
    """How `--check` tells of a kind: the group it is counted in, what was expected, what to do about it."""

    group: str
    expected: str
    remedy: str


_BROKEN_LINE = "repair or delete the line"
_IN_TURN = "user, assistant, user, assistant, …"
_AS_THE_SHAPE_ASKS = "write the value as the shape asks"
_TEXT_OR_LIST = Defect("wrong type", "text, or a list where the shape has one", _AS_THE_SHAPE_ASKS)

DEFECTS = {
    # a line of the file
    "broken-json": Defect("broken line", "one whole JSON object a line", _BROKEN_LINE),
    "columns": Defect("broken line", "as many cells as the header", f"{_BROKEN_LINE}, quote commas"),
    # the keys of a row
    "not-an-object": Defect("wrong type", "a JSON object with named fields", "write the row as {…}"),
    "a-whole-file": Defect("unknown keys", "a row an object", "write the rows as a JSON array or as JSON lines"),
    "unknown-keys": Defect("unknown keys", "the keys of a known shape", "rename the keys as docs/data.md shows"),
    "ambiguous-keys": Defect("ambiguous keys", "the keys of one shape", "remove the keys that are not meant"),
    "multiple-choice": Defect("unknown keys", "a question and an answer", "score with it, do not train on it"),
    "preference": Defect("unknown keys", "a question and one answer", "keep the chosen answer under a key of a shape"),
    "media": Defect("unusable", "text alone", "delete the row or what it shows"),
    "unread": Defect("unknown keys", "keys that are read", "rename or remove the key, see docs/data.md"),
    # the values of a row
    "not-text": _TEXT_OR_LIST,
    "not-a-list": _TEXT_OR_LIST,
    "not-pairs": _TEXT_OR_LIST,
    "not-a-dialogue": _TEXT_OR_LIST,
    "not-an-utterance": Defect("wrong type", "an utterance with its role and text", "write it as the shape asks"),
    "unknown-role": Defect("wrong type", "a known role", "rename the role"),
    "empty": Defect("empty", "text that can be seen", "write it or delete the row"),
    "only-blanks": Defect("empty", "text that can be seen", "write it or delete the row"),
    "half-a-character": Defect("broken text", "whole characters", "repair the text where it was cut"),
    "mark": Defect("wrong type", "a mark that says learnt or not", "write true or false; there are no other weights"),
    "nothing-to-learn": Defect("masked", "an answer that is learnt", "delete the row or the mark"),
    "plugin-call": Defect("unusable", "a known shape", "see docs/data.md"),
    # the turns of a conversation
    "no-turns": Defect("no question", "a question and its answer", "add them or delete the row"),
    "no-question": Defect("no question", "a question and its answer", "add them or delete the row"),
    "first-turn": Defect("turn order", _IN_TURN, "delete what stands before a question"),
    "last-turn": Defect("turn order", "an answer at the end", "add the answer or delete the last question"),
    "identity": Defect("identity", "a value for each placeholder", "--model_name 小黄 'Xiao Huang' --model_author …"),
    "thought": Defect("thought", "one whole thought before an answer", "write it as docs/data.md shows"),
    "tool-call": Defect("tool calls", "functions with a name, calls with an object", "write it as docs/data.md shows"),
    "tool-order": Defect("turn order", "each call with its results behind it", "add the results or delete the call"),
    # the ids of a conversation
    "template": Defect(
        "template", "what the prompt can show", "another --thinking or --prompt_style, or a model whose template has it"
    ),
    "long-answer": Defect(
        "over-long", "an answer within --max_length_a", "a larger --max_length_a or a shorter answer"
    ),
    "long-prompt": Defect(
        "masked",
        "room for the question: else every label of the row is masked",
        "a larger --max_length_q or a shorter system text",
    ),
    "unsupervised": Defect("masked", "an id that the loss counts", "look at the row's answer and at --loss_on"),
}

# keys, in small letters, that change what a row means, each with its kind and what is said where no reader used it
MATTERS = [
    (
        r"chosen|rejected|rejected_(response|messages)|kto_tag|(response|answer|output)_[jk01]|(pos|neg)_resp",
        "preference",
        "偏好对 a preference pair: two answers to compare, this trains on one",
    ),
    (
        r"choices?|options?|candidates|(option|choice)[ _]?[a-h1-8]|op[a-d]|选项.{0,2}|[a-h]选项",
        "multiple-choice",
        "选择题 a multiple-choice row: its options would be lost",
    ),
    (
        r"(image|img|picture|video|audio)s?([ _]?(path|url|file)s?)?|attachments?|图[片像]|视频|[音语][频音]",
        "media",
        "只读文字 only text is read; what the row shows would be lost",
    ),
    (
        r"(complex[ _])?cot|chain[ _]of[ _]thoughts?|thoughts?|think(ing)?"
        r"|reasoning([ _](content|process|steps|details))?|rationales?|思考(过程)?|思维链|推理(过程)?"
        r"|tool_calls|functions|function_calls?",
        "unread",
        "不读 is not read here and would be lost; join it to what is read (a thought under reasoning_content, or as "
        "<think>…</think> before the answer), or remove it",
    ),
]
# the same of keys of a message or a round
MARK = r"(loss|sample)_(weight|scale|mask)s?|(is_)?masked|train(able|ing|_detail|_on_turn)|learn(able)?|ignored?"


@lru_cache(maxsize=4096)
def matter_of(key: str, inside: bool = False) -> tuple[str, str]:
    """(kind, what is said) of a key that changes what a row means; ("", "") of others.

    inside: the key is one of a message or a round.
    """
    key = key.strip().lower()
    if inside and re.fullmatch(MARK, key):
        return "mark", "像是学习标记 seems to mark what is learnt, is not read; write loss: true or false"
    return next((found[1:] for found in MATTERS if re.fullmatch(found[0], key)), ("", ""))
