"""What the service's threads and the batcher's thread hand each other: an Ask, and the Parts of its answers."""

from __future__ import annotations

import queue
import random
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from common.inference.answerer import Sampling
from common.inference.text import Wording, decode

if TYPE_CHECKING:
    from common.conversation.turns import Call
    from common.engine.batcher import Batcher

POLL = 0.2  # seconds between two looks whether a client is still there

TopIds = list[tuple[int, float]]  # the most probable ids in one place, with their log probabilities


class ClientGoneError(Exception):
    """The client has left."""


class RequestTimeoutError(Exception):
    """The request's time is over."""


class ModelFailedError(Exception):
    """The model failed on this request."""


@dataclass(frozen=True)
class Ask:
    """One answer to generate: prompt ids, how to draw, and how to show it.

    stop: strings that end the answer and are left out. logprobs: how many alternatives to report for each id, None
    for no log probabilities. clean: as chat answers are shown, thought and calls apart; else as generated. live: parts
    are wanted on the way. tools: those on offer, a JSON list as text. special: special tokens stay in the text.
    """

    ids: list[int]
    sampling: Sampling
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    clean: bool = True
    live: bool = False
    tools: str = ""
    special: bool = False


class Entry(NamedTuple):
    """Log probability of one generated id, and [(id, log probability)] of the most probable ones in its place."""

    id: int
    logprob: float
    top: TopIds


@dataclass(frozen=True)
class Part:
    """Some text of answer `index` and its Entries. `stop` is "stop" or "length" with the last part, else None.

    thought stands before the text, calls behind it.
    """

    index: int
    text: str
    entries: list[Entry]
    stop: str | None
    thought: str = ""
    calls: tuple[Call, ...] = ()


class Ticket:
    """A request under way: its rows, one for each answer wanted, and what has become of them."""

    def __init__(
        self, model: str, asks: Sequence[Ask], batcher: Batcher, seconds: float | None = None, client: str = ""
    ) -> None:
        """asks: one Ask an answer. seconds: the time limit. client: who asks; no other one shares what it has read."""
        self.model = model
        self.client = client
        self.events: queue.SimpleQueue[Part | Exception] = queue.SimpleQueue()
        self.rows = [Row(self, index, ask, batcher) for index, ask in enumerate(asks)]
        self.wake = batcher.wake
        self.cancelled = False
        self.created = time.monotonic()
        self.deadline = self.created + seconds if seconds else None
        self.started: float | None = None  # its first row has a slot
        self.first: float | None = None  # its first id is there
        self.ended: float | None = None

    def parts(self, gone: Callable[[], bool] = lambda: False) -> Generator[list[Part], None, None]:
        """Yield lists of Parts, as they come, until every answer has ended.

        gone: asked now and then whether the client has left. Raises ClientGoneError, RequestTimeoutError or
        ModelFailedError; whatever ends it, the rows are given up.
        """
        left = len(self.rows)
        try:
            while left:
                found = self._next(gone)
                left -= sum(part.stop is not None for part in found)
                yield found
                if left and self.deadline and time.monotonic() > self.deadline:  # parts may come without a pause
                    raise RequestTimeoutError
        finally:
            self.ended = time.monotonic()
            self.cancel()

    def cancel(self) -> None:
        """Give the rows up, wherever they are."""
        self.cancelled = True
        self.wake()

    @property
    def tokens(self) -> int:
        """Ids generated so far, of all answers."""
        return sum(len(row.ids) for row in self.rows)

    def texts(self) -> dict[str, str | list[str]]:
        """{"prompt": text, "texts": answers}, for a log that is asked to hold them."""
        first = self.rows[0]
        return {
            "prompt": decode(first.words.tokenizer, first.ask.ids),
            "texts": [row.text for row in self.rows],
        }

    def _next(self, gone: Callable[[], bool]) -> list[Part]:
        """The Parts that have come since the last call, at least one; raises what came instead."""
        while True:
            events: list[Part | Exception] = []
            try:
                events.append(self.events.get(timeout=POLL))
                while not self.events.empty():
                    events.append(self.events.get())
            except queue.Empty:
                pass
            found = []
            for event in events:
                if isinstance(event, Exception):
                    raise event
                found.append(event)
            if found:
                return found
            if gone():
                raise ClientGoneError
            if self.deadline and time.monotonic() > self.deadline:
                raise RequestTimeoutError


class Row:
    """One answer under way, in the batcher's hands. `ids`: those of its text; `counts`: how often it has each."""

    def __init__(self, ticket: Ticket, index: int, ask: Ask, batcher: Batcher) -> None:
        self.ticket = ticket
        self.index = index
        self.ask = ask
        self.scope = ticket.model, ticket.client  # of the prefixes it shares
        self.cached = 0  # tokens of its prompt that had been read before
        self.stop_ids = batcher.stop_ids
        self.kept = batcher.special if ask.special else batcher.answer.kept
        clean, reading = (batcher.clean, batcher.answer.reading(ask.ids, ask.tools)) if ask.clean else (None, None)
        self.words = Wording(batcher.tokenizer, clean, ask.stop, reading, self.kept)
        self.ids = self.words.ids
        self.counts: Counter[int] = Counter()
        self.random = random.Random(ask.seed)
        self.unsent = ""  # text that is ready to be handed over
        self.sent = 0  # characters that have been handed over
        self.entries: list[tuple[int, Entry]] = []  # not handed over yet: (characters of the text up to it, Entry)
        self.stop: str | None = None  # why it has ended: "stop" or "length"
        self.over = False

    @property
    def width(self) -> int:
        """Columns it may come to fill."""
        return len(self.ask.ids) + self.ask.sampling.max_new_tokens

    @property
    def text(self) -> str:
        """All that was given out so far; where thought and calls are apart, the answer as it is written."""
        return decode(self.words.tokenizer, self.ids, self.kept) if self.words.reading else self.words.shown

    def take(self, id_: int | None, logprob: tuple[float, TopIds] | None = None) -> None:
        """Add the next id (with its log probability and alternatives); `over` where the answer ends with it.

        FloatingPointError where there is none, the model's logits being no numbers.
        """
        if id_ is None:
            raise FloatingPointError("logits are no numbers; with float16 the model may need bfloat16 or float32")
        self.ticket.first = self.ticket.first or time.monotonic()
        if id_ in self.stop_ids:
            return self.end("stop")
        self.ids.append(id_)
        self.counts[id_] += 1
        if self.ask.live or self.ask.stop:
            self.unsent += self.words.more()
        if logprob:
            self.entries.append((self.words.length, Entry(id_, *logprob)))
        if self.words.stopped or len(self.ids) >= self.ask.sampling.max_new_tokens:
            self.end("length")
        elif self.ask.live and (self.unsent or self.words.thought or self.words.calls or len(self.ids) == 1):
            self._send(None)  # the first id is a sign of life

    def end(self, stop: str) -> None:
        """Hand over what is left of the text; stop: "stop" or "length", why it ended."""
        self.unsent += self.words.more(ended=True)
        self.stop = "stop" if self.words.stopped else stop
        self.over = True
        self._send(self.stop)

    def fail(self, error: Exception) -> None:
        """End it with an exception."""
        self.over = True
        self.ticket.events.put(error)

    def _send(self, stop: str | None) -> None:
        """Hand over the new text with the entries of its ids; those of a stop string stay behind."""
        text, self.unsent = self.unsent, ""
        thought, calls = self.words.aside()
        self.sent += len(thought) + len(text)
        whole = stop and not self.words.stopped
        ready = [entry for length, entry in self.entries if whole or length <= self.sent]
        self.entries = self.entries[len(ready) :]
        self.ticket.events.put(Part(self.index, text, ready, stop, thought, calls))
