"""A generated text as thought, text and calls, whole or while it arrives.

transformers' `parse_response` reads whole answers alone and gives up at a call that is cut off or broken; here such a
call is text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from common.conversation import render
from common.conversation.answer_form import parameters_of
from common.conversation.turns import Call
from common.inference.text import Cleaning, unsettled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.conversation.answer_form import AnswerForm

TAIL = 16  # ids at a prompt's end that may hold the mark which opens a thought


class Thought(NamedTuple):
    """Some of what a stream thinks, beside what it says."""

    text: str


Streamed = str | Thought | Call  # what a stream yields: some text, some of a thought, a call


class Parts(NamedTuple):
    """Some of an answer. Calls stand behind the text, wherever the model wrote them."""

    thought: str = ""
    text: str = ""
    calls: tuple[Call, ...] = ()


def pieces(parts: Parts) -> Iterator[Streamed]:
    """What a stream yields of some Parts."""
    if parts.thought:
        yield Thought(parts.thought)
    if parts.text:
        yield parts.text
    yield from parts.calls


class Reading:
    """Reads text as it comes: the parts add up to those of all of it.

    asked_open: the prompt ends within a thought. tools: those on offer, a JSON list as text; without any, calls are
    text as it is written. What may be the start of a mark, or is an unfinished call, is kept back in `held`.
    """

    def __init__(self, form: AnswerForm, asked_open: bool = False, tools: str = "") -> None:
        self.form = form
        self.parameters = parameters_of(tools)
        self.calling = bool(tools) and form.read_calls is not None
        self.step: Callable[[bool], Parts] = self._in_thought if asked_open else self._at_start
        self.held = ""
        self.thinking = Cleaning(lambda text, ended: text.strip())

    def more(self, text: str, ended: bool = False) -> Parts:
        """The Parts that are new with `text` and will not change; with `ended` all that is left."""
        self.held += text
        found: list[Parts] = []
        step = None
        while step != self.step:
            step = self.step
            found.append(step(ended))
        thought, said = "".join(part.thought for part in found), "".join(part.text for part in found)
        return Parts(thought, said, tuple(call for part in found for call in part.calls))

    def _at_start(self, ended: bool) -> Parts:
        """Before anything is said: a thought may begin here."""
        opening, said = self.form.thought[0], self.held.lstrip()
        if opening and said.startswith(opening):
            self.held = said[len(opening) :]
            self.step = self._in_thought
        elif ended or not opening.startswith(said):
            self._answer()
        return Parts()

    def _in_thought(self, ended: bool) -> Parts:
        thought, mark = self._until(self.form.thought[1], ended)
        if mark:
            self._answer()
        return Parts(thought=self.thinking.more(thought, bool(mark) or ended))

    def _answer(self) -> None:
        """What comes next is the answer itself."""
        self.step = self._in_bare_call if self.calling and self.form.bare else self._in_text

    def _in_text(self, ended: bool) -> Parts:
        text, mark = self._until(self.form.call[0] if self.calling else "", ended)
        if mark:
            self.step = self._in_call
        return Parts(text=text)

    def _in_call(self, ended: bool) -> Parts:
        """Behind the mark of a call, which is read once it is whole."""
        opening, closing = self.form.call
        body, mark, rest = self.held.partition(closing)
        if not mark and not ended:
            return Parts()
        self.held, self.step = rest, self._in_text
        calls = self._calls(body) if mark else ()
        return Parts(calls=calls) if calls else Parts(text=opening + body + mark)

    def _in_bare_call(self, ended: bool) -> Parts:
        """At the start of an answer that may be calls without marks, as a whole."""
        assert self.form.bare
        if not ended and self.form.bare.fullmatch(self.held.lstrip()):
            return Parts()
        self.step = self._in_text
        calls = self._calls(self.held) if ended else ()
        self.held = "" if calls else self.held
        return Parts(calls=calls)

    def _calls(self, text: str) -> tuple[Call, ...]:
        assert self.form.read_calls
        try:
            return tuple(self.form.read_calls(text, self.parameters))
        except (ValueError, RecursionError):
            return ()

    def _until(self, mark: str, ended: bool) -> tuple[str, str]:
        """(what stands before a mark, the mark) where it is there, or (what is surely no part of it, "")."""
        before, found, rest = self.held.partition(mark) if mark else (self.held, "", "")
        if not found and not ended:
            end = len(before) - unsettled(before, [mark])
            before, rest = before[:end], before[end:]
        self.held = rest
        return before, found


def reading_of(
    tokenizer: PreTrainedTokenizerBase, form: AnswerForm, prompt_ids: Sequence[int], tools: str
) -> Reading | None:
    """The Reading of the answer to a prompt; None where the answer cannot be anything but text."""
    if not form.thought[0] and not (tools and form.read_calls):
        return None
    return Reading(form, asked_open(tokenizer, form, prompt_ids), tools)


def asked_open(tokenizer: PreTrainedTokenizerBase, form: AnswerForm, prompt_ids: Sequence[int]) -> bool:
    """Whether a prompt ends within a thought, so that its answer begins there."""
    opening = form.thought[0].rstrip()
    return bool(opening) and render.shown(tokenizer, prompt_ids[-TAIL:]).rstrip().endswith(opening)


def kept_of(tokenizer: PreTrainedTokenizerBase, form: AnswerForm) -> dict[int, str]:
    """{id: token} of the form's control tokens that the tokenizer's own decode leaves out."""
    known = tokenizer.get_added_vocab()
    ids = {known[token]: token for token in form.tokens if token in known}
    return {id_: token for id_, token in ids.items() if not tokenizer.decode([id_], skip_special_tokens=True)}
