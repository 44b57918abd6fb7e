"""One model for many requests at once: a thread that owns it, and slots that rows take and leave between two steps."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from common.conversation.turns import Turn
from common.device import hand_back
from common.engine import sampling
from common.engine.beam_search import Beams
from common.engine.group import Group, columns, width
from common.engine.kv_batch import KVBatch
from common.engine.prompt_encoder import PromptEncoder
from common.engine.request import Ask, ModelFailedError, Row, Ticket
from common.engine.switch import Switch
from common.inference.cache import new_cache
from common.inference.prefix_cache import PrefixCache

if TYPE_CHECKING:
    from common.inference.answerer import Answerer

CHUNK = 512  # prompt tokens read between two steps of the rows under way
REST = 1.0  # seconds without a row, after which memory that is free goes back to the system
log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """No slot is free, and no place in the queue."""


class Batcher:
    """Answers Asks with one model; all methods may be called from any thread.

    answer: an Answerer. models: {name: peft's name of its adapter, None for the base}. slots: answers generated
    together; queue: answers that may wait; request_tokens: most of a prompt and its answer, 0: the model's context;
    total_tokens: most in the cache, pads and kept prefixes included, 0: no limit.
    """

    def __init__(
        self,
        answer: Answerer,
        models: dict[str, str | None],
        slots: int = 16,
        queue: int = 128,
        request_tokens: int = 0,
        total_tokens: int = 0,
    ) -> None:
        self.answer = answer
        self.models = models
        self.slots = slots
        self.queue = queue
        self.total_tokens = total_tokens
        self.tokenizer = answer.tokenizer
        self.stop_ids = set(answer.stop_ids)
        self.clean = answer.prompt.clean
        self.special = dict(zip(self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens, strict=True))
        self.special |= answer.kept
        self.encoder = PromptEncoder(answer)
        self.switch = Switch(answer)
        self.net = self.switch.net
        new_cache(self.net.config)  # refused now, not with the first request
        self.prefixes = self._nothing_kept()
        context = getattr(self.net.config, "max_position_embeddings", None) or 2**31
        self.context = min(context, request_tokens or context)  # most tokens of a prompt and its answer
        self.expected = ""  # the model that will be asked for, until its step is recorded
        self.probe = self.encoder.whole_ids([Turn("user", "你好")])
        self.changed = threading.Condition()  # guards `waiting`
        self.waiting: deque[Row] = deque()
        self.groups = {name: Group() for name in models}
        self.beams: list[Beams] = []
        self.active_count = 0
        self.forwards = 0
        self.rested = 0  # forwards until memory was handed back
        self.broken = self.closed = False
        self.thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self.thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are still answered."""
        return self.thread.is_alive() and not self.broken

    def submit(self, model: str, asks: Sequence[Ask], seconds: float | None = None, client: str = "") -> Ticket:
        """The Ticket of a request for one answer to each Ask, to be given within `seconds`.

        client: who asks; what its prompts begin with is kept for it alone. QueueFullError where they do not fit,
        ModelFailedError where nobody works.
        """
        ticket = Ticket(model, asks, self, seconds, client)
        with self.changed:
            if self.closed or not self.alive:
                raise ModelFailedError
            waiting = sum(not row.ticket.cancelled for row in self.waiting)
            if waiting + self.active_count + len(asks) > self.slots + self.queue:
                raise QueueFullError
            self.waiting += ticket.rows
            self.changed.notify()
        return ticket

    def expect(self, model: str) -> None:
        """Record the step of a model while nobody asks, so that its first answer does not wait for that."""
        self.expected = model
        self.wake()

    def wake(self) -> None:
        """Have a look: something was cancelled."""
        with self.changed:
            self.changed.notify()

    def close(self) -> None:
        """Give up what is under way and end the thread."""
        self.closed = True
        self.wake()
        self.thread.join()

    def _nothing_kept(self) -> PrefixCache:
        return PrefixCache(self.net, self.total_tokens or None)

    def _run(self) -> None:
        """The thread: a step of every group, again and again, as long as there are rows."""
        try:
            with torch.inference_mode():
                while not self.closed and not self.broken:
                    self._wait()
                    self._make_ready()
                    self._let_go()
                    self._admit()
                    for name, group in self.groups.items():
                        self._work(name, group)
                    self._turn_beams()
        finally:
            with self.changed:
                self.broken = True
                for row in [*self._active(), *self.waiting]:
                    row.fail(ModelFailedError("the model's thread has ended"))
                self.waiting = deque()
                self.active_count = 0

    def _wait(self) -> None:
        """Until there is something to do; memory is handed back where there is nothing for REST seconds."""
        with self.changed:
            wanted = self.changed.wait_for(
                lambda: self.closed or self.waiting or self.active_count or self.expected,
                REST if self.rested != self.forwards else None,
            )
        if not wanted:
            self.encoder.rest()
            hand_back()
            self.rested = self.forwards

    def _make_ready(self) -> None:
        model, self.expected = self.expected, ""
        if model and not self.closed and not self.waiting and not self.active_count:
            self.switch.use(self.models[model])
            self.switch.replay()

    def _active(self) -> list[Row]:
        """All rows that have a slot."""
        in_groups = [row for group in self.groups.values() for row in group.rows()]
        return in_groups + [beams.row for beams in self.beams]

    def _let_go(self) -> None:
        """Free the slots of rows whose clients have left."""
        for group in self.groups.values():
            group.pending = deque(row for row in group.pending if not row.ticket.cancelled)
            group.prefills = deque(p for p in group.prefills if not all(row.ticket.cancelled for row in p.rows))
            self._sieve(group, lambda row: not row.ticket.cancelled)
        with self.changed:
            self.waiting = deque(row for row in self.waiting if not row.ticket.cancelled)

    def _admit(self) -> None:
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
        if self.total_tokens:  # rows come first
            self.prefixes.most_tokens = self.total_tokens - columns(active)
            self.prefixes.shrink()

    def _fits(self, active: list[Row], row: Row) -> bool:
        """Whether there is a slot and room in the cache for one more row; a row alone always fits."""
        rows = [*active, row]
        within = not self.total_tokens or columns(rows) <= self.total_tokens
        return not active or width(rows) <= self.slots and within

    def _work(self, name: str, group: Group) -> None:
        """At most one chunk of prompts is read, then every row gets one more id."""
        if not group.rows():
            return
        self.switch.use(self.models[name])
        short = group.next_prompts(self.prefixes, CHUNK)
        if short:
            group.prefills.append(self._prefill_of(short))
        try:
            if group.prefills:
                self._read(group, group.prefills[0])
            if group.batch:
                self._step(group, group.batch)
        except Exception as error:  # no memory to join their caches, or to cut them
            self._failure(group.give_up(), error)

    def _prefill_of(self, rows: list[Row]) -> KVBatch:
        return KVBatch(self.net, rows, [row.ask.ids for row in rows], self.answer.pad_id)

    def _read(self, group: Group, prefill: KVBatch) -> None:
        """Read the next chunk; rows whose prompts are read join those under way."""
        try:
            if not prefill.read_to:
                prefill.resume(self.prefixes)
            logits = prefill.prefill(CHUNK)
        except Exception as error:
            group.prefills.popleft()
            if len(prefill.rows) > 1 or prefill.rows[0].cached:  # one of them, or what is kept: each alone, without it
                self.prefixes = self._nothing_kept()
                group.prefills += [self._prefill_of([row]) for row in prefill.rows]
            else:
                self._failure(prefill.rows, error)
            return
        if logits is None:
            group.prefills.rotate(-1)
            return
        self._take(prefill.rows, logits)
        self._offer(prefill, range(len(prefill.rows)))
        going = [number for number, row in enumerate(prefill.rows) if not row.over]
        if going and len(going) < len(prefill.rows):
            prefill.keep(going)
        if going and group.batch:
            group.batch.join(prefill)
        elif going:
            group.batch = prefill
        group.prefills.popleft()

    def _step(self, group: Group, batch: KVBatch) -> None:
        """Give every row of the group's batch one more id."""
        try:
            logits = batch.step([row.ids[-1] for row in batch.rows], self.switch.replay())
        except Exception as error:
            group.batch = None
            return self._failure(batch.rows, error)
        self._take(batch.rows, logits)
        self._sieve(group, lambda row: not row.over)

    def _sieve(self, group: Group, wanted: Callable[[Row], bool]) -> None:
        """Keep the wanted ones of the rows under way."""
        if group.batch:
            numbers = [number for number, row in enumerate(group.batch.rows) if wanted(row)]
            self._offer(group.batch, sorted({*range(len(group.batch.rows))} - {*numbers}))
            if not numbers:
                group.batch = None
            elif len(numbers) < len(group.batch.rows):
                group.batch.keep(numbers)

    def _offer(self, batch: KVBatch, numbers: Sequence[int]) -> None:
        """Keep what these rows of a batch have read; where there is no memory for it, nothing is kept any more."""
        try:
            batch.offer(self.prefixes, numbers)
        except Exception as error:
            self._failure([], error)

    def _take(self, rows: list[Row], logits: torch.Tensor) -> None:
        """Give each row its next id; logits [B, V]."""
        self.forwards += 1
        wanted = [row.ask.logprobs for row in rows]
        given = logits.clone() if any(count is not None for count in wanted) else logits
        try:
            ids = sampling.next_ids(logits, rows)
            told = sampling.logprobs(given, ids, wanted)
        except Exception as error:
            return self._failure(rows, error)
        for row, id_, logprob in zip(rows, ids, told, strict=True):
            try:
                row.take(id_, logprob)
            except Exception as error:
                self._failure([row], error)

    def _turn_beams(self) -> None:
        """One step of each beam search."""
        for beams in list(self.beams):
            self.switch.use(self.models[beams.row.ticket.model])
            self.forwards += 1
            if beams.step():
                self.beams.remove(beams)
                if beams.error:
                    self._failure([beams.row], beams.error)
                else:
                    self._end_beams(beams.row, beams.ids)

    def _end_beams(self, row: Row, ids: list[int]) -> None:
        """Hand over the answer that a beam search has found."""
        ends = [number for number, id_ in enumerate(ids) if id_ in self.stop_ids]
        row.ticket.first = time.monotonic()
        row.ids += ids[: ends[0]] if ends else ids
        row.end("stop" if ends else "length")

    def _failure(self, rows: list[Row], error: Exception) -> None:
        """Fail these rows. The others go on, unless the model cannot even read a greeting any more."""
        log.error("模型出错 the model failed on %d request(s)", len(rows), exc_info=error)
        self.prefixes = self._nothing_kept()  # memory may have been short
        for row in rows:
            row.fail(ModelFailedError(type(error).__name__))
        try:
            KVBatch(self.net, [], [self.probe], self.answer.pad_id).prefill(CHUNK)
        except Exception:
            self.broken = True
            log.exception("模型不再工作 the model does not work any more")
