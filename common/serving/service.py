"""What is served, and how a request that was let in becomes an answer: whole, or as server-sent events."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from flask import Response, request

from common.engine.batcher import Batcher, QueueFullError
from common.engine.request import Ask, ClientGoneError, ModelFailedError, Part, RequestTimeoutError, Ticket
from common.inference.answerer import Sampling
from common.serving.failures import FAILURES, RequestRefusedError, error_object, json_response
from common.serving.openai_requests import Wanted, fitted
from common.serving.openai_responses import Shape
from common.serving.text_generate import read_request
from common.serving.validation import read_json


@dataclass
class Service:
    """What the app serves, and how. `batcher` is None until the model is loaded.

    run_name: what /health calls the run. model: the name served where a request names none. defaults: Sampling where
    a request says nothing. seconds: a request's time limit. log_text: questions and answers go into the log.
    """

    run_name: str
    model: str = "tuned"
    batcher: Batcher | None = None
    defaults: Sampling = field(default_factory=Sampling)
    api_key: str = ""
    cors: str = ""
    seconds: float = 600
    log_text: bool = False
    draining: bool = False

    @property
    def state(self) -> str:
        """ok, loading, draining, or dead."""
        if self.draining:
            return "draining"
        if self.batcher is None:
            return "loading"
        return "ok" if self.batcher.alive else "dead"

    @property
    def loaded(self) -> Batcher:
        """The Batcher; RequestRefusedError until the model is loaded."""
        if self.batcher is None:
            why = "模型还在加载 the model is still loading"
            raise RequestRefusedError(why, 503, code="loading", headers={"Retry-After": "5"})
        return self.batcher

    def model_called(self, name: str) -> str:
        """A model's name; the served one for ""; RequestRefusedError where there is none of that name."""
        names = list(self.loaded.models)
        if name and name not in names:
            why = f"没有模型 there is no model {name[:64]!r}; there are: {', '.join(names)}"
            raise RequestRefusedError(why, 404, "model", "model_not_found")
        return name or self.model


def text_generate(service: Service) -> Response:
    """Answer the current request of POST /nlg/text_generate: one JSON string."""
    body, batcher = read_json(request), service.loaded
    turns, sampling = read_request(body)
    ids = batcher.encoder.whole_ids(turns)
    asked = "max_new_tokens" if "max_new_tokens" in body else ""
    ask = Ask(ids, fitted(sampling, len(ids), batcher.context, asked))
    ticket = _submit(service, service.model, [ask])
    return json_response("".join(part.text for parts in ticket.parts(_gone()) for part in parts))


def complete(service: Service, read: Callable[[dict[str, Any], Batcher, Sampling], Wanted]) -> Response:
    """Answer the current request for a chat or a completion, whose body `read` reads."""
    wanted = read(read_json(request), service.loaded, service.defaults)
    model = service.model_called(wanted.model)
    ticket = _submit(service, model, wanted.asks)
    shape = Shape(wanted, request.environ["service.record"]["id"], model, service.loaded)
    parts = ticket.parts(_gone())
    if wanted.stream:
        first = next(parts)  # what fails before has a status of its own
        response = Response(_events(first, parts, ticket, shape), mimetype="text/event-stream")
        response.headers["Cache-Control"] = "no-store"
        response.call_on_close(ticket.cancel)
        return response
    return json_response(shape.whole([part for more in parts for part in more], ticket.tokens))


def _submit(service: Service, model: str, asks: list[Ask]) -> Ticket:
    """The Ticket of some Asks; RequestRefusedError where they cannot be taken. The log line will tell of it."""
    try:
        ticket = service.loaded.submit(model, asks, service.seconds)
    except QueueFullError:
        why = "服务繁忙 all slots and the queue are full; try again"
        raise RequestRefusedError(why, 429, code="queue_full", headers={"Retry-After": "1"}) from None
    request.environ["service.ticket"] = ticket
    request.environ["service.log_text"] = service.log_text
    return ticket


def _gone() -> Callable[[], bool]:
    """Tells whether the client of the current request has left."""
    return request.environ.get("waitress.client_disconnected", lambda: False)


def _events(
    first: list[Part], parts: Generator[list[Part], None, None], ticket: Ticket, shape: Shape
) -> Iterator[bytes]:
    """Server-sent events of Parts; what fails on the way is the last one, and [DONE] is missing."""
    try:
        yield _event(*map(shape.chunk, first))
        for more in parts:
            yield _event(*map(shape.chunk, more))
        if shape.wanted.include_usage:
            yield _event(shape.last_chunk(ticket.tokens))
        yield b"data: [DONE]\n\n"
    except (ModelFailedError, RequestTimeoutError) as error:
        message, status, code = FAILURES[type(error)]
        yield _event(error_object(message, status, code=code))
    except ClientGoneError:
        pass
    finally:
        parts.close()


def _event(*values: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n" for value in values)
