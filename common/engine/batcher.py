"""One model for many requests at once: a thread that owns it, and slots that rows take and leave between two steps."""

import logging
import threading
import time
from collections import deque

import torch

from common.data.turns import Turn
from common.engine import sampling
from common.engine.beam_search import Beams
from common.engine.kv_batch import Rows
from common.engine.prompt_encoder import PromptEncoder
from common.engine.request import Failed, Ticket
from common.model.layers import causal_of

CHUNK = 512  # prompt tokens read between two steps of the rows under way
log = logging.getLogger(__name__)


class Full(Exception):
    """No slot is free, and no place in the queue."""


class Group:
    """What goes on under one name (base, or an adapter): prompts to read, prompts being read, rows under way."""

    def __init__(self):
        self.pending, self.readings, self.rows = deque(), deque(), None

    def owners(self):
        """All Rows it has."""
        under_way = self.rows.owners if self.rows else []
        return [*self.pending, *(owner for reading in self.readings for owner in reading.owners), *under_way]


class Batcher:
    """Answers Asks with one model; all methods may be called from any thread.

    answer: an Answerer. models: {name: peft's name of its adapter, None for the base}. slots: answers generated
    together; queue: answers that may wait; request_tokens: most of a prompt and its answer, 0: the model's context;
    total_tokens: most in the cache, pads included, 0: no limit.
    """

    def __init__(self, answer, models, slots=16, queue=128, request_tokens=0, total_tokens=0):
        self.answer, self.models, self.slots, self.queue, self.total_tokens = answer, models, slots, queue, total_tokens
        self.tokenizer, self.stop_ids, self.clean = answer.tokenizer, set(answer.stop_ids), answer.prompt.clean
        self.net = causal_of(answer.net)
        self.peft = None if answer.net is self.net else answer.net
        context = getattr(self.net.config, "max_position_embeddings", None) or 2**31
        self.context = min(context, request_tokens or context)  # most tokens of a prompt and its answer
        self.waiting, self.groups, self.beams = deque(), {name: Group() for name in models}, []
        self.active_count, self.forwards, self.broken, self.closed = 0, 0, False, False
        self.adapter = "" if self.peft else None  # what the net is set to; "" is nothing yet
        self.changed = threading.Condition()
        self.encoder = PromptEncoder(answer)
        self.probe = self.encoder.whole_ids([Turn("user", "你好")])
        self.thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self.thread.start()

    @property
    def alive(self):
        """Whether requests are still answered."""
        return self.thread.is_alive() and not self.broken

    def submit(self, model, asks, seconds=None):
        """The Ticket of a request for one answer to each Ask; Full where they do not fit, Failed where nobody works."""
        ticket = Ticket(model, asks, self, seconds)
        with self.changed:
            if self.closed or not self.alive:
                raise Failed
            if len(self.waiting) + self.active_count + len(asks) > self.slots + self.queue:
                raise Full
            self.waiting += ticket.rows
            self.changed.notify()
        return ticket

    def wake(self):
        """Have a look: something was cancelled."""
        with self.changed:
            self.changed.notify()

    def close(self):
        """Give up what is under way and end the thread."""
        self.closed = True
        self.wake()
        self.thread.join()

    def _run(self):
        try:
            with torch.inference_mode():
                while not self.closed and not self.broken:
                    with self.changed:
                        self.changed.wait_for(lambda: self.closed or self.waiting or self.active_count)
                    self._let_go()
                    self._admit()
                    for name, group in self.groups.items():
                        self._work(name, group)
                    self._turn_beams()
        finally:
            with self.changed:
                self.broken = True
                for row in [*self._active(), *self.waiting]:
                    row.fail(Failed("the model's thread has ended"))
                self.waiting, self.active_count = deque(), 0

    def _active(self):
        in_groups = [owner for group in self.groups.values() for owner in group.owners()]
        return in_groups + [beams.row for beams in self.beams]

    def _let_go(self):
        """Free the slots of rows whose clients have left."""
        for group in self.groups.values():
            group.pending = deque(row for row in group.pending if not row.ticket.cancelled)
            group.readings = deque(r for r in group.readings if not all(row.ticket.cancelled for row in r.owners))
            self._sieve(group, lambda row: not row.ticket.cancelled)
        with self.changed:
            self.waiting = deque(row for row in self.waiting if not row.ticket.cancelled)

    def _admit(self):
        """Move rows from the queue into slots, in order."""
        with self.changed:
            active = self._active()
            while self.waiting and self._fits(active, self.waiting[0]):
                row = self.waiting.popleft()
                active.append(row)
                row.ticket.started = row.ticket.started or time.monotonic()
                if row.ask.sampling.num_beams > 1:
                    self.beams.append(Beams(self.net, row, self.answer.generation_config(row.ask.sampling)))
                else:
                    self.groups[row.ticket.model].pending.append(row)
            self.active_count = len(active)

    def _fits(self, active, row):
        rows = [*active, row]
        used = sum(other.ask.sampling.num_beams for other in rows)
        within = not self.total_tokens or used * max(other.width for other in rows) <= self.total_tokens
        return not active or used <= self.slots and within

    def _work(self, name, group):
        """At most one chunk of prompts is read, then every row gets one more id."""
        if not group.owners():
            return
        self._use(self.models[name])
        short = []
        while group.pending and (len(short) + 1) * max(len(r.ask.ids) for r in [*short, group.pending[0]]) <= CHUNK:
            short.append(group.pending.popleft())
        if group.pending and not short:
            short = [group.pending.popleft()]
        if short:
            group.readings.append(self._reading(short))
        if group.readings:
            self._read(group, group.readings.popleft())
        if group.rows:
            self._step(group)

    def _reading(self, rows):
        return Rows(self.net, rows, [row.ask.ids for row in rows], self.answer.pad_id)

    def _read(self, group, reading):
        """Read the next chunk; rows whose prompts are read join those under way."""
        try:
            logits = reading.read(CHUNK)
        except Exception as error:
            if len(reading.owners) > 1:  # one of them may be to blame: each alone
                group.readings += [self._reading([row]) for row in reading.owners]
            else:
                self._failure(reading.owners, error)
            return
        if logits is None:
            group.readings.append(reading)
            return
        self._take(reading.owners, logits)
        going = [number for number, row in enumerate(reading.owners) if not row.over]
        if not going:
            return
        if len(going) < len(reading.owners):
            reading.keep(going)
        if group.rows:
            group.rows.join(reading)
        else:
            group.rows = reading

    def _step(self, group):
        try:
            logits = group.rows.step([row.ids[-1] for row in group.rows.owners])
        except Exception as error:
            self._failure(group.rows.owners, error)
            group.rows = None
            return
        self._take(group.rows.owners, logits)
        self._sieve(group, lambda row: not row.over)

    def _sieve(self, group, wanted):
        """Keep the wanted ones of the rows under way."""
        if group.rows:
            numbers = [number for number, row in enumerate(group.rows.owners) if wanted(row)]
            if not numbers:
                group.rows = None
            elif len(numbers) < len(group.rows.owners):
                group.rows.keep(numbers)

    def _take(self, rows, logits):
        """Give each row its next id."""
        self.forwards += 1
        wanted = [row.ask.logprobs for row in rows]
        given = logits.clone() if any(count is not None for count in wanted) else logits
        ids = sampling.next_ids(logits, rows)
        for row, id_, logprob in zip(rows, ids, sampling.logprobs(given, ids, wanted), strict=True):
            try:
                row.take(id_, logprob)
            except Exception as error:
                self._failure([row], error)

    def _turn_beams(self):
        """One step of each beam search."""
        for beams in list(self.beams):
            self._use(self.models[beams.row.ticket.model])
            if beams.step():
                self.beams.remove(beams)
                if beams.error:
                    self._failure([beams.row], beams.error)
                else:
                    self._end_beams(beams.row, beams.ids)

    def _end_beams(self, row, ids):
        ends = [number for number, id_ in enumerate(ids) if id_ in self.stop_ids]
        row.ticket.first = time.monotonic()
        row.ids += ids[: ends[0]] if ends else ids
        row.end("stop" if ends else "length")

    def _failure(self, rows, error):
        """Fail these rows. The others go on, unless the model cannot even read a greeting any more."""
        log.error("模型出错 the model failed on %d request(s)", len(rows), exc_info=error)
        for row in rows:
            row.fail(Failed(type(error).__name__))
        try:
            Rows(self.net, [None], [self.probe], self.answer.pad_id).read(CHUNK)
        except Exception:
            self.broken = True
            log.exception("模型不再工作 the model does not work any more")

    def _use(self, adapter):
        """Set the net to an adapter, None for the base."""
        if self.peft is None or adapter == self.adapter:
            return
        if adapter is None:
            self.peft.base_model.disable_adapter_layers()
        else:
            self.peft.base_model.enable_adapter_layers()
            self.peft.set_adapter(adapter, inference_mode=True)
        self.adapter = adapter
