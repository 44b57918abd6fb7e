"""OpenAI's answers: the engine's Parts as choices and chunks."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common.conversation.answer_form import as_openai

if TYPE_CHECKING:
    from common.conversation.turns import Call
    from common.engine.batcher import Batcher
    from common.engine.request import Entry, Part, Ticket
    from common.serving.openai_requests import Wanted


class Shape:
    """What a client gets: JSON objects of one request, whole or in chunks. Texts of several answers side by side."""

    def __init__(self, wanted: Wanted, name: str, model: str, batcher: Batcher) -> None:
        """name: the request's id."""
        self.wanted = wanted
        self.batcher = batcher
        self.started: set[int] = set()  # numbers of the answers whose first chunk is made
        prefix, kind = ("chatcmpl-", "chat.completion") if wanted.chat else ("cmpl-", "text_completion")
        self.head = {"id": prefix + name, "object": kind, "created": int(time.time()), "model": model}
        self.called: Counter[int] = Counter()  # calls of each answer so far
        self.offsets = [0] * len(wanted.asks)  # characters of each answer whose log probabilities are out

    def usage(self, ticket: Ticket) -> dict[str, Any]:
        """Token counts; a prompt with n answers counts once."""
        rows, tokens = ticket.rows[:: self.wanted.n], ticket.tokens
        asked = sum(len(row.ask.ids) for row in rows)
        counts = {"prompt_tokens": asked, "completion_tokens": tokens, "total_tokens": asked + tokens}
        return counts | {"prompt_tokens_details": {"cached_tokens": sum(row.cached for row in rows)}}

    def whole(self, parts: Sequence[Part], ticket: Ticket) -> dict[str, Any]:
        """The answer to a request that is not streamed; parts: all of them."""
        choices = []
        for index in range(len(self.wanted.asks)):
            mine = [part for part in parts if part.index == index]
            text = "".join(part.text for part in mine)
            entries = [entry for part in mine for entry in part.entries]
            said: dict[str, Any] = {"text": text}
            if self.wanted.chat:
                said = {"message": self._message(index, text, mine)}
            choices.append(self._choice(index, said, entries, mine[-1].stop))
        return self.head | {"choices": choices, "usage": self.usage(ticket)}

    def _message(self, index: int, text: str, parts: Sequence[Part]) -> dict[str, Any]:
        """A whole answer; thought and calls are there where there are any."""
        thought = "".join(part.thought for part in parts)
        calls = self._calls(index, [call for part in parts for call in part.calls])
        message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
        return message | _apart(thought, calls)

    def _calls(self, index: int, calls: Sequence[Call]) -> list[dict[str, Any]]:
        """The next calls of an answer, each with an id of its own."""
        self.called[index] += len(calls)
        return [{"id": f"call_{uuid.uuid4().hex[:24]}", **call} for call in as_openai(calls)]

    def chunk(self, part: Part) -> dict[str, Any]:
        """The chunk of one Part; the first one of a chat's answer names the role."""
        said: dict[str, Any] = {"text": part.text}
        if self.wanted.chat:
            role = {} if part.index in self.started else {"role": "assistant"}
            first = self.called[part.index]
            calls = [{"index": n, **call} for n, call in enumerate(self._calls(part.index, part.calls), first)]
            content = {"content": part.text} if part.text or role else {}
            said = {"delta": role | content | _apart(part.thought, calls)}
            self.started.add(part.index)
        choice = self._choice(part.index, said, part.entries, part.stop)
        kind = "chat.completion.chunk" if self.wanted.chat else "text_completion"
        return self.head | {"object": kind, "choices": [choice]}

    def last_chunk(self, ticket: Ticket) -> dict[str, Any]:
        """The chunk that holds the token counts."""
        kind = "chat.completion.chunk" if self.wanted.chat else "text_completion"
        return self.head | {"object": kind, "choices": [], "usage": self.usage(ticket)}

    def _choice(self, index: int, said: dict[str, Any], entries: Sequence[Entry], stop: str | None) -> dict[str, Any]:
        logprobs = None
        if self.wanted.asks[index].logprobs is not None:
            logprobs = self._chat_logprobs(entries) if self.wanted.chat else self._logprobs(index, entries)
        ended = "tool_calls" if stop == "stop" and self.called[index] else stop
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": ended}

    def _chat_logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        def one(id_: int, logprob: float) -> dict[str, Any]:
            token, raw = self.batcher.encoder.token(id_)
            return {"token": token, "logprob": max(logprob, -9999.0), "bytes": raw}

        content = [one(e.id, e.logprob) | {"top_logprobs": [one(*other) for other in e.top]} for e in entries]
        return {"content": content, "refusal": None}

    def _logprobs(self, index: int, entries: Sequence[Entry]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            token, _ = self.batcher.encoder.token(entry.id)
            found["tokens"].append(token)
            found["token_logprobs"].append(max(entry.logprob, -9999.0))
            found["top_logprobs"].append({self.batcher.encoder.token(id_)[0]: max(p, -9999.0) for id_, p in entry.top})
            found["text_offset"].append(self.offsets[index])
            self.offsets[index] += len(token)
        return found


def _apart(thought: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields of thought and calls, each where there is something in it."""
    fields = {"reasoning_content": thought, "tool_calls": calls}
    return {name: value for name, value in fields.items() if value}
