"""Rows to be scored that the training files hold too: such a score says what was remembered, not what was learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common import files
from common.config import SFTConfig
from common.conversation.answer_form import written
from common.conversation.turns import Conversation, Turn
from common.data import dataset
from common.errors import UserError

Key = tuple[str, tuple[str, ...]]  # "q" or "a", and the texts and calls of a conversation


def count(manifest: dict[str, Any], rows: Sequence[tuple[str, Sequence[Turn]]], apart: bool = False) -> dict[str, Any]:
    """{questions, rows, unread}: how many of `rows` [(where, turns)] have their question, or question and answer, in
    the files that the run in `manifest`, and those whose adapter it started from, were trained on; `unread` names files
    that are gone or no longer the same.

    Blanks and system texts do not count. apart: the rows are the run's validation rows, which were kept out of
    training: what stands in their own line of the file is no overlap.
    """
    wanted: dict[Key, set[int]] = {}
    for number, (_, turns) in enumerate(rows):
        for kept in (turns[:-1], turns):
            wanted.setdefault(_key(kept), set()).add(number)
    own = {where for where, _ in rows} if apart else set()
    trained: set[Key] = set()
    unread = []
    trained_with = manifest["config"]
    knobs = SFTConfig(model_name=tuple(trained_with["model_name"]), model_author=tuple(trained_with["model_author"]))
    for source in _sources(manifest):
        try:
            same = files.file_hash(source["path"]) == source["sha256"]
        except UserError:
            same = False
        if not same:
            unread.append(source["path"])
            continue
        for row in dataset.conversations(source["path"], knobs):
            if isinstance(row, Conversation) and row.where not in own:
                trained |= _keys_of(row.turns) & wanted.keys()
    questions, whole = ({number for key in trained if key[0] == kind for number in wanted[key]} for kind in "qa")
    return {"questions": len(questions), "rows": len(whole), "unread": unread}


def _sources(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Each file that the run, or one of those whose adapter it started from, was trained on; once."""
    earlier = [source for one in manifest.get("lineage", []) for source in one["data"]]
    return list({(source["path"], source["sha256"]): source for source in [*earlier, *manifest["data"]]}.values())


def _keys_of(turns: Sequence[Turn]) -> set[Key]:
    """Keys of every question and every answer in a conversation, with all that was said before."""
    return {_key(turns[:end]) for end in range(1, len(turns) + 1)}


def _key(turns: Sequence[Turn]) -> Key:
    """("q" for a question or "a" for an answer at the end, the texts and calls without blanks)."""
    texts = tuple("".join(written(turn.text, turn.calls).split()) for turn in turns if turn.role != "system")
    return ("a" if turns[-1].role == "assistant" else "q", texts)
