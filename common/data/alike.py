"""What rows say, as digests that tell equal rows and questions, and the control tokens that are typed in them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy

from common.conversation.render import template_words
from common.conversation.turns import Conversation, Turn, Unusable, is_more, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_QUESTION = 0  # the digest of what a plain text asks
PARTS = 1 << 32  # above any line's number: a place in a file is line + part × PARTS


class Typed(NamedTuple):
    """A row (file:line) with control tokens in its texts."""

    where: str
    tokens: list[str]


class Digests:
    """Collects what the conversations of a file say.

    rows: (`number_of` the row, digest of the row, digest of its question) of each. typed: those with control tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.rows: list[tuple[int, int, int]] = []
        self.typed: list[Typed] = []

    def noted(self, row: Conversation | Unusable) -> Conversation | Unusable:
        """The row, which is noted where it can be used."""
        if isinstance(row, Conversation):
            self.rows.append((number_of(row.where), *digests_of(row.turns)))
            tokens = typed_tokens(self._tokenizer, row.turns)
            if tokens:
                self.typed.append(Typed(row.where, tokens))
        return row

    def table(self) -> numpy.ndarray:
        """The rows as uint64 [N, 3]."""
        return numpy.array(self.rows, numpy.uint64).reshape(-1, 3)


def number_of(where: str) -> int:
    """The place of a row (file:line, or file:line.part) in its file, as a number; that of a line is its own."""
    line, _, part = where.rpartition(":")[2].partition(".")
    return int(line) + int(part or 0) * PARTS


def _place_of(number: int) -> str:
    """What stands behind the file's name, of `number_of`."""
    part, line = divmod(number, PARTS)
    return f"{line}.{part}" if part else str(line)


def digests_of(turns: Sequence[Turn]) -> tuple[int, int]:
    """(digest of the turns, of all but the last one), 64 bits each; blanks around a text do not count."""
    *asked, answer = map(_bytes, turns)
    digest = hashlib.blake2b(b"".join(asked), digest_size=8)
    question = digest.digest() if asked else bytes([NO_QUESTION])
    digest.update(answer)
    return int.from_bytes(digest.digest(), "little"), int.from_bytes(question, "little")


def _bytes(turn: Turn) -> bytes:
    """What a turn says, so that no two joined rows are the same bytes."""
    text = turn.text.strip()
    more = repr((turn.thought, turn.calls, turn.tools)) if is_more(turn) else ""
    return f"{turn.role} {len(text)} {text}{len(more)} {more}".encode("utf-8", "surrogatepass")


def typed_tokens(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> list[str]:
    """Control tokens in the texts of a conversation, sorted: the tokenizer's own, also those its chat template alone
    makes such (<tool_call>), and what looks like <|one|>.
    """
    control, beginnings = _control(tokenizer, str(tokenizer.chat_template))
    texts = [text for turn in turns for text in texts_of(turn) if any(map(text.__contains__, beginnings))]
    return sorted({match for text in texts for match in control.findall(text)})


@lru_cache(maxsize=8)
def _control(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[re.Pattern[str], frozenset[str]]:
    """(a pattern of control tokens, the characters they begin with)."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    words = [*special, *template_words(tokenizer, template)]
    pattern = "|".join([*map(re.escape, words), r"<\|\w+\|>"])  # the last: what most templates use
    return re.compile(pattern), frozenset(token[0] for token in ["<", *words])


class Known:
    """The rows of several files, to ask which of them stand there twice and which others are among them."""

    def __init__(self, files: Sequence[tuple[str, numpy.ndarray]]) -> None:
        """files: (path, a table of `Digests` without the rows that are left out)."""
        self._paths = [path for path, _ in files]
        tables = [numpy.empty((0, 3), numpy.uint64), *(table for _, table in files)]
        self._places, rows, questions = numpy.concatenate(tables).T
        self._file: numpy.ndarray = numpy.repeat(numpy.arange(len(files)), [len(table) for _, table in files])
        self._rows, self._first, self._number = numpy.unique(rows, return_index=True, return_inverse=True)
        self._questions = set(questions[questions != NO_QUESTION].tolist())

    def _where(self, number: int) -> str:
        return f"{self._paths[self._file[number]]}:{_place_of(int(self._places[number]))}"

    def repeated(self) -> list[tuple[str, str]]:
        """(where a row stands first, where again) of each that does; several of one row are no repetition."""
        first = self._first[self._number]
        again = (self._file != self._file[first]) | (self._places != self._places[first])
        return [(self._where(first[number]), self._where(number)) for number in numpy.flatnonzero(again).tolist()]

    def twin(self, digest: int) -> str | None:
        """Where a row with this digest stands first."""
        place = int(numpy.searchsorted(self._rows, numpy.uint64(digest)))
        same = place < len(self._rows) and int(self._rows[place]) == digest
        return self._where(int(self._first[place])) if same else None

    def asks(self, digest: int) -> bool:
        """Whether a row asks the question with this digest."""
        return digest in self._questions
