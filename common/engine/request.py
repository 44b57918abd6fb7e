"""What the service's threads and the batcher's thread hand each other: an Ask, and the Parts of its answers."""

import queue
import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from common.inference.answerer import Sampling
from common.inference.text import Wording, decode

POLL = 0.2  # seconds between two looks whether a client is still there


class Gone(Exception):
    """The client has left."""


class TimedOut(Exception):
    """The request's time is over."""


class Failed(Exception):
    """The model failed on this request."""


@dataclass(frozen=True)
class Ask:
    """One answer to generate: prompt ids, how to draw, and how to show it.

    stop: strings that end the answer and are left out. logprobs: how many alternatives to report for each id, None
    for no log probabilities. clean: as chat answers are shown; else as generated. live: parts are wanted on the way.
    """

    ids: list
    sampling: Sampling
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple = ()
    logprobs: int | None = None
    clean: bool = True
    live: bool = False


class Entry(NamedTuple):
    """Log probability of one generated id, and [(id, log probability)] of the most probable ones in its place."""

    id: int
    logprob: float
    top: list


class Part(NamedTuple):
    """Some text of answer `index` and its Entries. `stop` is "stop" or "length" with the last part, else None."""

    index: int
    text: str
    entries: list
    stop: str | None


class Ticket:
    """A request under way: its rows, one for each answer wanted, and what has become of them."""

    def __init__(self, model, asks, batcher, seconds=None):
        """asks: one Ask an answer. seconds: the time limit."""
        self.model, self.events, self.cancelled = model, queue.SimpleQueue(), False
        self.rows = [Row(self, index, ask, batcher) for index, ask in enumerate(asks)]
        self.created, self.started, self.first, self.ended = time.monotonic(), None, None, None
        self.deadline = self.created + seconds if seconds else None
        self.wake = batcher.wake

    def parts(self, gone=lambda: False):
        """Yield lists of Parts, as they come, until every answer has ended.

        gone: asked now and then whether the client has left. Raises Gone, TimedOut or Failed; whatever ends it, the
        rows are given up.
        """
        left = len(self.rows)
        try:
            while left:
                found = self._next(gone)
                left -= sum(part.stop is not None for part in found)
                yield found
        finally:
            self.ended = time.monotonic()
            self.cancel()

    def cancel(self):
        """Give the rows up, wherever they are."""
        self.cancelled = True
        self.wake()

    @property
    def tokens(self):
        """Ids generated so far, of all answers."""
        return sum(len(row.ids) for row in self.rows)

    def texts(self):
        """{"prompt": text, "texts": answers}, for a log that is asked to hold them."""
        words = self.rows[0].words
        return {
            "prompt": decode(words.tokenizer, self.rows[0].ask.ids),
            "texts": [row.words.shown for row in self.rows],
        }

    def _next(self, gone):
        while True:
            try:
                found = [self.events.get(timeout=POLL)]
                while not self.events.empty():
                    found.append(self.events.get())
            except queue.Empty:
                found = []
            for event in found:
                if isinstance(event, Exception):
                    raise event
            if found:
                return found
            if gone():
                raise Gone
            if self.deadline and time.monotonic() > self.deadline:
                raise TimedOut


class Row:
    """One answer under way, in the batcher's hands."""

    def __init__(self, ticket, index, ask, batcher):
        self.ticket, self.index, self.ask, self.stop_ids = ticket, index, ask, batcher.stop_ids
        self.words = Wording(batcher.tokenizer, batcher.clean if ask.clean else None, ask.stop)
        self.ids, self.counts, self.entries = self.words.ids, Counter(), []
        self.unsent, self.sent = "", 0  # text to be handed over, and characters that have been
        self.random, self.stop, self.over = random.Random(ask.seed), None, False

    @property
    def width(self):
        """Columns it may come to fill."""
        return len(self.ask.ids) + self.ask.sampling.max_new_tokens

    def take(self, id_, logprob=None):
        """Add the next id (with its log probability and alternatives); `over` where the answer ends with it."""
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
        elif self.ask.live and (self.unsent or len(self.ids) == 1):  # the first id is a sign of life
            self._send(None)

    def end(self, stop):
        """Hand over what is left of the text."""
        self.unsent += self.words.more(ended=True)
        self.over, self.stop = True, "stop" if self.words.stopped else stop
        self._send(self.stop)

    def fail(self, error):
        """End it with an exception."""
        self.over = True
        self.ticket.events.put(error)

    def _send(self, stop):
        """Hand over the new text with the entries of its ids; those of a stop string stay behind."""
        text, self.unsent = self.unsent, ""
        self.sent += len(text)
        whole = stop and not self.words.stopped
        ready = [entry for length, entry in self.entries if whole or length <= self.sent]
        self.entries = self.entries[len(ready) :]
        self.ticket.events.put(Part(self.index, text, ready, stop))
