"""Around every request: its id, its log line, its counts for Prometheus, and how many are under way."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from common.engine.request import Ticket
    from common.serving.tracing import Tracer

log = logging.getLogger("service")
ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
QUIET = ("/health", "/metrics")  # asked for every few seconds by machines
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Counts:
    """What /metrics shows."""

    def __init__(self, waiting: Callable[[], int], active: Callable[[], int], kept: Callable[[], int]) -> None:
        """waiting, active: called for the answers in the queue and in slots; kept: for the tokens of kept prefixes."""
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("requests", "Requests answered", ["path", "status"], **made)
        self.prompt_tokens = Counter("prompt_tokens", "Prompt tokens", ["model"], **made)
        self.cached_tokens = Counter("cached_tokens", "Prompt tokens that had been read before", ["model"], **made)
        self.completion_tokens = Counter("completion_tokens", "Tokens generated", ["model"], **made)
        self.queued = Histogram("queue_seconds", "Time a request waits for a slot", buckets=SECONDS, **made)
        self.first = Histogram("time_to_first_token_seconds", "Until the first token", buckets=SECONDS, **made)
        self.total = Histogram("request_seconds", "Until the last byte", ["path"], buckets=SECONDS, **made)
        Gauge("requests_waiting", "Answers in the queue", **made).set_function(waiting)
        Gauge("requests_active", "Answers in slots", **made).set_function(active)
        Gauge("kept_tokens", "Tokens kept for prompts that begin alike", **made).set_function(kept)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    def add(self, record: dict[str, Any]) -> None:
        """Count one request that is over."""
        self.requests.labels(record["path"], record["status"]).inc()
        self.total.labels(record["path"]).observe(record["ms"] / 1000)
        if "prompt_tokens" in record:
            self.prompt_tokens.labels(record["model"]).inc(record["prompt_tokens"])
            self.cached_tokens.labels(record["model"]).inc(record["cached_tokens"])
            self.completion_tokens.labels(record["model"]).inc(record["completion_tokens"])
        for name, histogram in (("queued_ms", self.queued), ("first_token_ms", self.first)):
            if record.get(name) is not None:
                histogram.observe(record[name] / 1000)


class Watch:
    """WSGI around the app. `environ["service.record"]` is a dict the app adds to; it becomes the log line."""

    def __init__(self, app: WSGIApplication, counts: Counts, tracer: Tracer | None = None) -> None:
        self.app = app
        self.counts = counts
        self.tracer = tracer
        self.lock = threading.Lock()
        self.under_way = 0  # requests that have begun and not ended

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        started = time.monotonic()
        given = environ.get("HTTP_X_REQUEST_ID", "")
        name = given if ID.fullmatch(given) else uuid.uuid4().hex
        record = {"id": name, "method": environ["REQUEST_METHOD"][:10], "path": "other", "status": 500}
        environ["service.record"] = record

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None, /) -> Callable[[bytes], object]:
            record["status"] = int(status[:3])
            headers += [("X-Request-ID", name), ("X-Content-Type-Options", "nosniff")]
            return start_response(status, headers, exc_info)

        with self.lock:
            self.under_way += 1
        return _Body(self.app(environ, start), lambda: self._end(environ, started))

    def _end(self, environ: WSGIEnvironment, started: float) -> None:
        record = environ["service.record"]
        seconds = time.monotonic() - started
        with self.lock:
            self.under_way -= 1
        record |= {"ms": round(seconds * 1000), **_about(environ.get("service.ticket"))}
        self.counts.add(record)
        if self.tracer and record["path"] not in QUIET:
            self.tracer.add(record, environ.get("HTTP_TRACEPARENT", ""))
        if environ.get("service.log_text"):
            record |= environ["service.ticket"].texts()
        log.log(logging.DEBUG if record["path"] in QUIET else logging.INFO, "%s", json.dumps(record))


def _about(ticket: Ticket | None) -> dict[str, Any]:
    """What a log line says of a ticket, if there is one; no text of the user."""
    if ticket is None:
        return {}
    return {
        "model": ticket.model,
        "answers": len(ticket.rows),
        "prompt_tokens": sum(len(row.ask.ids) for row in ticket.rows),
        "cached_tokens": sum(row.cached for row in ticket.rows),
        "completion_tokens": ticket.tokens,
        "queued_ms": ticket.started and round((ticket.started - ticket.created) * 1000),
        "first_token_ms": ticket.first and round((ticket.first - ticket.created) * 1000),
        "stop": [row.stop for row in ticket.rows],
    }


class _Body:
    """A response's body. `end` is called once it is over: sent, or given up by the server."""

    def __init__(self, body: Iterable[bytes], end: Callable[[], None]) -> None:
        self.body = body
        self.parts = iter(body)
        self.end = end

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self.parts)

    def close(self) -> None:
        """Called by the server in any case."""
        try:
            if hasattr(self.body, "close"):
                self.body.close()
        finally:
            self.end()
