"""Kinds of defects that leave a row out: what `--check` calls each, what it expects instead, and the remedy."""

from typing import NamedTuple


class Defect(NamedTuple):
    """How `--check` tells of a kind: the group it is counted in, what was expected, what to do about it."""

    group: str
    expected: str
    remedy: str


class RowError(ValueError):
    """Why a row cannot be used: `kind`, a key of DEFECTS, and `reason`, a line for people."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


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
    # the ids of a conversation
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
