"""Turns with thoughts, tools, calls and results as ids, through the tokenizer's own chat template.

The template gives one text. It is split at control tokens, which become ids; what is between them is encoded as text.
Control tokens typed in a conversation are hidden from the template by a character of private use inside each, which is
taken out again. The ids are those of apply_chat_template(tokenize=True), with two exceptions: typed control tokens stay
text, and a trained answer is encoded apart from the prompt that asks for it, so that the two together are the row. To a
template that would show a text beside a call behind the call's result, the two are two messages.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from common.conversation.render import ANSWER, CONTEXT, FRAME, QUESTION, Piece, encode_text, special_id, template_words
from common.conversation.thinking import leaves_out, thinks
from common.conversation.turns import Call, FormatError, Turn, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRIVATE = [chr(code) for code in range(0xE000, 0xE100)]
BESIDE = ("said", "called", "given")  # a text, the name of a call beside it, its result
PROBE = [Turn("user", "?"), Turn("assistant", "", calls=(Call("f", "{}"),)), Turn("tool", "1")]


class Marks(NamedTuple):
    """What a family's templates put around an answer."""

    begin: re.Pattern[str]  # before it, wherever one begins
    end: re.Pattern[str]  # the control token that ends it
    last: str  # that token behind a last answer, where the template shows none
    last_call: str  # the same behind one that ends with calls
    thought: tuple[str, str]  # around a thought


class Span(NamedTuple):
    """Places in a text: where what stands before an answer begins, where the answer does, where it ends."""

    header: int
    start: int
    end: int


def wanted(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], shows: bool) -> bool:
    """Whether turns are to be rendered by `pieces`: they are more than texts, or the template thinks.

    shows: whether this prompt style can show more than texts; FormatError where it has to and cannot.
    """
    hidden = leaves_out(tokenizer)
    more = any(turn.calls or turn.tools or turn.role == "tool" or turn.thought and not hidden for turn in turns)
    if more and not shows:
        raise FormatError(
            "template",
            "没有思考和工具 this prompt style shows no thoughts and tools: --thinking none leaves thoughts out",
        )
    return shows and (more or thinks(tokenizer))


def pieces(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], marks: Marks) -> list[Piece]:
    """The Pieces of turns: the prompt as the template shows it, and the last answer where the turns end with one.

    An answer is learnt from where its generation prompt ends. Results of tools are CONTEXT. FormatError where the
    template refuses the turns, leaves out a text of theirs, or asks otherwise than it shows the last answer.
    """
    shown = _Shown(tokenizer, turns, _sets_apart(tokenizer, str(tokenizer.chat_template), marks))
    answered = turns[-1].role == "assistant"
    asked = turns[: len(turns) - answered]
    prompt = shown.text(asked, ask=True)
    spans = _spans(prompt, marks)
    earlier = [number for number, turn in enumerate(asked) if turn.role == "assistant"]
    shown.check_spans(prompt, spans, [turns[number] for number in earlier])
    cuts: dict[int, str] = {}  # place in the prompt: the part that begins there
    before = 0
    for span, number in zip(spans, earlier, strict=True):
        asker = turns[number - 1].role if number else ""
        cuts[before] = CONTEXT if asker == "tool" else QUESTION
        cuts[span.header] = CONTEXT if asker in ("", "system", "tool") else FRAME
        opening = _opening(tokenizer, str(tokenizer.chat_template), asker, marks)
        start = span.start + (len(opening) if prompt.startswith(opening, span.start) else 0)
        cuts[start] = ANSWER if turns[number].learn else CONTEXT
        before = span.end
    cuts[before] = CONTEXT if turns[len(asked) - 1].role == "tool" else QUESTION
    if not answered:
        shown.check(asked, prompt)
        return shown.encoded(prompt, cuts)
    answer = _answer(prompt, shown.text(turns, ask=False), turns[-1], marks)
    shown.check(turns, prompt + answer)
    (last,) = shown.encoded(answer, {0: ANSWER if turns[-1].learn else CONTEXT})
    return [*shown.encoded(prompt, cuts), last]


def _answer(prompt: str, whole: str, turn: Turn, marks: Marks) -> str:
    """What follows `prompt` in a trained row: the answer as the conversation `whole` shows it, with its end."""
    border = len(os.path.commonprefix([prompt, whole]))
    start = max((found.end() for found in marks.begin.finditer(prompt)), default=0)
    opened = prompt[start:] + whole[border:]
    counts = {opened.count(mark) for mark in marks.thought}
    if border < start or border < len(prompt) and len(counts) > 1:
        raise FormatError(
            "template",
            f"聊天模板的提问与回答不合 the chat template asks with {prompt[start:]!r} and shows this answer otherwise: "
            f"--thinking {'keep' if turn.thought else 'auto'}, or none",
        )
    end = marks.end.search(whole, border)
    return whole[border : end.end()] if end else whole[border:] + (marks.last_call if turn.calls else marks.last)


def _spans(text: str, marks: Marks) -> list[Span]:
    """The Spans of all answers that end in `text`, in order."""
    spans: list[Span] = []
    place = 0
    while begin := marks.begin.search(text, place):
        end = marks.end.search(text, begin.end())
        if not end:
            break
        spans.append(Span(begin.start(), begin.end(), end.end()))
        place = end.end()
    return spans


@lru_cache(maxsize=64)
def _opening(tokenizer: PreTrainedTokenizerBase, template: str, asker: str, marks: Marks) -> str:
    """What a generation prompt puts behind the beginning of an answer to a question, or to a result of a tool."""
    turns = PROBE if asker == "tool" else PROBE[:1]
    try:
        asked = _Shown(tokenizer, turns).text(turns, ask=True)
    except FormatError:
        return ""
    begins = list(marks.begin.finditer(asked))
    return asked[begins[-1].end() :] if begins else ""


@lru_cache(maxsize=64)
def _sets_apart(tokenizer: PreTrainedTokenizerBase, template: str, marks: Marks) -> bool:
    """Whether the template shows a text and a call of one answer in their order only as two messages.

    As one message it shows the text behind the result of the call, as two within one answer.
    """
    asked, (text, name, result) = PROBE[0], BESIDE
    turns = [asked, Turn("assistant", text, calls=(Call(name, "{}"),)), Turn("tool", result)]
    try:
        one, two = (_Shown(tokenizer, turns, apart).text(turns, ask=False) for apart in (False, True))
    except FormatError:
        return False
    begins = [end.end() for end in marks.begin.finditer(two, 0, max(two.find(text), 0))]
    within = two[begins[-1] : two.find(name)] if begins else ""
    return -1 < one.find(result) < one.find(text) and text in within and not marks.end.search(within)


@lru_cache(maxsize=8)
def _control(tokenizer: PreTrainedTokenizerBase, template: str) -> re.Pattern[str]:
    """Matches the tokenizer's control tokens: its special tokens, and those that its template writes.

    One character cannot be hidden from it by another in its middle: typed, it is text.
    """
    added = tokenizer.added_tokens_decoder.values()
    words = {token.content for token in added if token.special and len(token.content) > 1} | set(
        template_words(tokenizer, template)
    )
    return re.compile("(" + "|".join(map(re.escape, sorted(words, key=len, reverse=True))) + ")")


class _Shown:
    """Conversations as one tokenizer's template shows them, typed control tokens hidden, and such texts as ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], apart: bool = False) -> None:
        """apart: a text beside calls is a message of its own, before them."""
        self.tokenizer = tokenizer
        self.apart = apart
        self.control = _control(tokenizer, str(tokenizer.chat_template))
        texts = [text for turn in turns for text in texts_of(turn)]
        hidden = next((char for char in PRIVATE if all(char not in text for text in texts)), None)
        if hidden is None:
            raise FormatError("template", "私用字符太多 every character of U+E000 to U+E0FF is in it: take one out")
        self.hidden = hidden

    def text(self, turns: Sequence[Turn], ask: bool) -> str:
        """The turns as the template shows them; ask: with a generation prompt. FormatError where it refuses them."""
        try:
            return self.tokenizer.apply_chat_template(
                self._messages(turns), tools=self._tools(turns), tokenize=False, add_generation_prompt=ask
            )
        except Exception as problem:  # raise_exception in a template, or an error of its own
            raise FormatError("template", f"聊天模板拒绝 the chat template refuses the row: {problem}") from None

    def check(self, turns: Sequence[Turn], text: str) -> None:
        """FormatError where a text of the turns, a tool, a call, or the thought to learn is not in `text`."""
        last = turns[-1]
        if last.role == "assistant" and not leaves_out(self.tokenizer):
            never = any(turn.thought for turn in turns) and not thinks(self.tokenizer)
            if never or self._hide(last.thought.strip()) not in text:
                raise FormatError(
                    "template", "聊天模板不显示思考 the chat template does not show the thought: --thinking none"
                )
        names = [tool["function"]["name"] for tool in self._tools(turns) or []]
        names += [self._hide(call.name) for turn in turns for call in turn.calls]
        lost = next((name for name in names if name not in text), None)
        if lost is not None:
            raise FormatError("template", f"聊天模板不显示工具 the chat template does not show the tool {lost[:40]}")
        lost = next((turn.role for turn in turns if self._hide(turn.text).strip() not in text), None)
        if lost is not None:
            raise FormatError("template", f"聊天模板略去 the chat template leaves out the text of a turn of {lost}")

    def check_spans(self, text: str, spans: Sequence[Span], answers: Sequence[Turn]) -> None:
        """FormatError where `spans` of `text` are not those of `answers`, with all they say and call."""
        fits = len(spans) == len(answers)
        for span, turn in zip(spans, answers, strict=False):
            own = text[span.start : span.end]
            fits &= all(self._hide(said).strip() in own for said in (turn.text, *(call.name for call in turn.calls)))
        if fits:
            return
        if any(turn.calls and turn.text.strip() for turn in answers):
            raise FormatError(
                "template",
                "聊天模板没有地方放调用旁的文字 the chat template has no place for the text beside a call before its "
                "result: give that answer its calls alone, without a text (content null)",
            )
        found = f"聊天模板里有 the chat template shows {len(spans)} 个回答 answers of {len(answers)}"
        raise FormatError("template", found)

    def encoded(self, text: str, parts: dict[int, str]) -> list[Piece]:
        """The ids of a text of `text` as Pieces; parts: {place where a part begins: which}, the first at 0.

        Where a part begins within an id, the id belongs to the part before.
        """
        ids: list[int] = []
        starts: dict[int, int] = {}  # place where a part begins: the number of ids before it
        place = 0
        for run in self.control.split(text):
            control = self.control.fullmatch(run)
            found = [special_id(self.tokenizer, run)] if control else self._text_ids(run)
            for cut in parts:
                if place <= cut < place + len(run):
                    behind = found if control else self._text_ids(run[cut - place :])
                    starts[cut] = len(ids) + len(found) - _alike_at_the_end(found, behind)
            ids += found
            place += len(run)
        cuts = sorted(starts)
        ends = [*(starts[cut] for cut in cuts[1:]), len(ids)]
        return [
            Piece(ids[starts[cut] : end], parts[cut]) for cut, end in zip(cuts, ends, strict=True) if end > starts[cut]
        ]

    def _text_ids(self, text: str) -> list[int]:
        return encode_text(self.tokenizer, text.replace(self.hidden, "")) if text else []

    def _hide(self, value: Any) -> Any:
        """A text, or lists and objects of texts, with control tokens hidden."""
        if isinstance(value, str):
            while self.control.search(value):
                value = self.control.sub(lambda typed: typed[0][0] + self.hidden + typed[0][1:], value)
            return value
        if isinstance(value, dict):
            return {self._hide(key): self._hide(inner) for key, inner in value.items()}
        return [self._hide(inner) for inner in value] if isinstance(value, list) else value

    def _tools(self, turns: Sequence[Turn]) -> list[Any] | None:
        """The tools on offer; None where there are none."""
        return self._hide(json.loads(turns[0].tools)) if turns[0].tools else None

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """The turns as OpenAI's messages, calls with ids, each result with that of its call."""
        messages: list[dict[str, Any]] = []
        results: list[dict[str, str]] = []  # what the results of the calls made last are of
        hidden = leaves_out(self.tokenizer)
        for number, turn in enumerate(turns):
            if turn.role == "system" and not turn.text.strip():
                continue  # tools alone
            message = {"role": turn.role, "content": self._hide(turn.text)}
            if turn.role == "assistant":
                message["reasoning_content"] = "" if hidden else self._hide(turn.thought)
                calls = [self._call(call, f"call_{number}_{place}") for place, call in enumerate(turn.calls)]
                if self.apart and calls and turn.text.strip():
                    messages.append(message)
                    message = {"role": turn.role, "content": ""}
                message |= {"tool_calls": calls} if calls else {}
                results = [{"tool_call_id": call["id"], "name": call["function"]["name"]} for call in calls]
            if turn.role == "tool" and results:
                message |= results.pop(0) if len(results) > 1 else results[0]
            messages.append(message)
        return messages

    def _call(self, call: Call, id_: str) -> dict[str, Any]:
        function = {"name": self._hide(call.name), "arguments": self._hide(json.loads(call.arguments))}
        return {"type": "function", "id": id_, "function": function}


def _alike_at_the_end(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids at the ends of two lists are the same."""
    pairs = zip(reversed(first), reversed(second), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
