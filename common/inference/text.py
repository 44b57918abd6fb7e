"""Ids as text: at once, or while they arrive: whole characters, cleaned, ended by a stop string that is left out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.conversation.turns import Call
    from common.inference.answer_parts import Reading

    Clean = Callable[[str, bool], str]  # Family.clean: (text, ended) to the text that is shown

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte piece of a SentencePiece vocabulary
WINDOW = 8  # ids that are decoded again with those after them; one character has at most four bytes, so four ids
AROUND = 64  # characters that are cleaned again with those after them; a family's clean looks at fewer neighbours


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], kept: Mapping[int, str] | None = None) -> str:
    """Text of generated ids; bytes that make no whole character are left out, and special ids but those of `kept`.

    kept: {id: its text}.
    """
    if kept and not kept.keys().isdisjoint(ids):
        runs = itertools.groupby(ids, lambda id_: kept.get(id_))
        return "".join(mark * len(list(run)) if mark else decode(tokenizer, list(run)) for mark, run in runs)
    if not tokenizer.is_fast:
        return tokenizer.decode(ids, skip_special_tokens=True).replace("\ufffd", "")
    text = ""
    for are_bytes, run in itertools.groupby(((id_, _byte(tokenizer, id_)) for id_ in ids), lambda p: p[1] is not None):
        if are_bytes:  # the tokenizer would turn a whole run into U+FFFD for one byte that is missing
            text += bytes(byte for _, byte in run if byte is not None).decode("utf-8", "ignore")
        else:
            text += tokenizer.decode([id_ for id_, _ in run], skip_special_tokens=True)
    return text.replace("\ufffd", "")


def _byte(tokenizer: PreTrainedTokenizerBase, id_: int) -> int | None:
    """The byte that an id stands for, where its piece is a byte."""
    match = BYTE.fullmatch(tokenizer.convert_ids_to_tokens(id_) or "")
    return int(match[1], 16) if match else None


class Decoding:
    """Turns ids into text as they come, in work that grows with their number: the parts add up to `decode` of all.

    Only the ids from `context` on are decoded. Those up to `end` were given out as text before; they are decoded again
    because a tokenizer writes some pieces differently at the start of a text, and because a character's first bytes
    may be among them. `context` may lie within a character: bytes left of it are no whole character, and add no text.
    The caller appends to `ids`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kept: Mapping[int, str] | None = None) -> None:
        self.tokenizer = tokenizer
        self.kept = kept
        self.ids: list[int] = []
        self.context = 0
        self.end = 0
        self.given = 0  # characters of the text of ids[context:] that have been given out

    def more(self) -> str:
        """The text that is new since the last call; a character whose bytes are not all there waits."""
        text = decode(self.tokenizer, self.ids[self.context :], self.kept)
        new = text[self.given :]
        self.given = max(self.given, len(text))
        if len(self.ids) - self.end >= WINDOW:
            self.context, self.end = self.end, len(self.ids)
            self.given = len(decode(self.tokenizer, self.ids[self.context :], self.kept))
        return new


class Cleaning:
    """Cleans text as it comes, in work that grows with its length: the parts add up to `clean` of all of it.

    clean(text, ended): how the family shows an answer; until it has ended, what later text could change is kept back.
    Only `raw`, the end of the text, is cleaned again. `given`: characters of the cleaned `raw` that were given out.
    """

    def __init__(self, clean: Clean) -> None:
        self.clean = clean
        self.raw = ""
        self.given = 0

    def more(self, text: str, ended: bool = False) -> str:
        """The cleaned text that is new with `text`; with `ended` all that is left."""
        self.raw += text
        cleaned = self.clean(self.raw, ended)
        new = cleaned[self.given :]
        self.given = max(self.given, len(cleaned))
        if len(self.raw) >= 2 * AROUND:
            self._shorten(cleaned)
        return new

    def _shorten(self, cleaned: str) -> None:
        """Keep only the last AROUND characters, where they are cleaned in the same way without those before them."""
        rest = self.raw[-AROUND:]
        alone = self.clean(rest, False)
        if len(alone) > AROUND // 2 and cleaned.endswith(alone):
            self.raw = rest
            self.given = len(alone)


class Wording:
    """Turns the ids of an answer into its text as they come: whole characters, cleaned, up to a stop string.

    clean(text, ended): how the family shows an answer; None leaves it as generated.
    stops: strings that end the text; of one that may be about to appear nothing is given out. reading: takes thought
    and calls out of the text, to be had by `aside`. kept: as in `decode`.
    The caller appends to `ids`. `length`: characters so far, also of what is kept back, and those of the thought.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        clean: Clean | None = None,
        stops: Sequence[str] = (),
        reading: Reading | None = None,
        kept: Mapping[int, str] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.decoding = Decoding(tokenizer, kept)
        self.reading = reading
        self.thought = ""  # not taken yet by `aside`, as the calls
        self.calls: tuple[Call, ...] = ()
        self.cleaning = Cleaning(clean) if clean else None
        self.stops = stops
        self.ids = self.decoding.ids
        self.parts: list[str] = []  # what was given out
        self.kept = ""  # cleaned text that may be the start of a stop string
        self.length = 0
        self.stopped = False

    @property
    def shown(self) -> str:
        """All text given out so far."""
        return "".join(self.parts)

    def more(self, ended: bool = False) -> str:
        """The text that is new and will not change; with `ended` all that is left. `stopped` after a stop string."""
        if self.stopped:
            return ""
        new = self.decoding.more()
        if self.reading:
            thought, new, calls = self.reading.more(new, ended)
            self.thought += thought
            self.calls += calls
            self.length += len(thought)
        if self.cleaning:
            new = self.cleaning.more(new, ended)
        self.length += len(new)
        self.kept += new
        found = [at for stop in self.stops if (at := self.kept.find(stop)) >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(self.kept) - (0 if ended else unsettled(self.kept, self.stops))
        part, self.kept = self.kept[:end], self.kept[end:]
        self.parts.append(part)
        return part

    def aside(self) -> tuple[str, tuple[Call, ...]]:
        """(thought, calls) that have come since they were last taken."""
        taken, self.thought, self.calls = (self.thought, self.calls), "", ()
        return taken


def unsettled(text: str, marks: Sequence[str]) -> int:
    """Number of characters at the end of a text that may be the start of one of `marks`."""
    longest = max((len(mark) for mark in marks), default=1) - 1
    ends = (text[-length:] for length in range(min(longest, len(text)), 0, -1))
    return next((len(end) for end in ends if any(mark.startswith(end) for mark in marks)), 0)
