"""The HTTP service: one Flask app over a Service: its life, its routes, who may use them, and each request's answer."""

from __future__ import annotations

import hmac
import json
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from flask import Flask, Response, current_app, request

from common.config import SFTConfig
from common.engine.batcher import Batcher, QueueFullError
from common.engine.request import Ask, ClientGoneError, ModelFailedError, Part, RequestTimeoutError, Ticket
from common.errors import RowError
from common.inference.answerer import Answerer, Sampling
from common.serving import adapters, openai_requests, text_generate, tracing
from common.serving.failures import FAILURES, RequestRefusedError, add_error_handlers, error_object, json_response
from common.serving.middleware import Counts, Watch
from common.serving.openai_responses import Shape
from common.serving.openapi import document
from common.serving.server import Server, drain, log_to_stderr, stop_signal
from common.serving.validation import LIMIT, Field, read_json

if TYPE_CHECKING:
    from common.config import ServeFlags
    from common.inference.remote import Remote
    from common.serving.openai_requests import Wanted

PAGES = Path(__file__).with_name("pages")
OPEN = ("/", "/docs", "/openapi.json", "/health")  # served without a key: they hold no text of a user
GENERATING = ("/nlg/text_generate", "/v1/chat/completions", "/v1/completions")
CSP = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
HERE = ("127.0.0.1", "localhost", "::1")  # hosts that other machines cannot reach

Config = TypeVar("Config", bound=SFTConfig)  # a family's own


@dataclass
class Service:
    """What the app serves, and how. `batcher` is None until the model is loaded.

    run_name: what /health calls the run. model: the name served where a request names none. defaults: Sampling where
    a request says nothing; penalties: the repetition penalty of models that have another one. fields: of POST
    /nlg/text_generate, which has defaults of its own. seconds: a request's time limit. api_key: the keys of clients; ()
    lets everyone in. log_text: questions and answers go into the log.
    """

    run_name: str
    model: str = "tuned"
    batcher: Batcher | None = None
    defaults: Sampling = field(default_factory=Sampling)
    penalties: dict[str, float] = field(default_factory=dict)
    fields: dict[str, Field] = field(default_factory=lambda: text_generate.FIELDS)
    api_key: tuple[str, ...] = ()
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


def create_app(service: Service) -> Flask:
    """The Flask app of a Service; its wsgi_app is a Watch."""
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = LIMIT
    app.url_map.merge_slashes = False  # a redirect is no answer to a client of an API
    counts = Counts(
        lambda: len(service.batcher.waiting) if service.batcher else 0,
        lambda: service.batcher.active_count if service.batcher else 0,
        lambda: service.batcher.prefixes.tokens if service.batcher else 0,
    )
    app.wsgi_app = Watch(app.wsgi_app, counts, tracing.tracer())  # type: ignore[method-assign]  # as Flask advises
    app.before_request(lambda: _let_in(service))
    app.after_request(lambda response: _with_cors(service, response))
    add_error_handlers(app)
    _add_pages(app, service, counts)
    _add_models(app, service)
    _add_answers(app, service)
    return app


def run(load_answer: Callable[[Config, bool], Answerer | Remote], cfg: Config, flags: ServeFlags) -> None:
    """What post_api.py does: listen, load, answer until told to stop, let answers finish.

    load_answer(cfg, base) loads the Answerer (a Remote comes only with an address). UserError where the port is taken
    or the model cannot be loaded.
    """
    log_to_stderr()
    service = Service(
        run_name=cfg.model_save_dir,
        model="base" if flags.base else "tuned",
        defaults=Sampling.of(cfg, num_beams=1),
        fields=text_generate.fields_of(cfg),
        api_key=flags.api_key,
        cors=flags.cors,
        seconds=flags.request_seconds,
        log_text=flags.log_text,
    )
    app = create_app(service)
    with closing(Server(app, cfg.host, cfg.port, flags.slots + flags.queue)) as server:
        answer = cast(Answerer, load_answer(cfg, flags.base))
        models = adapters.load(answer, flags.adapters, service.model)
        if "repetition_penalty" not in cfg.given:
            service.penalties = adapters.penalties(flags.adapters)
        service.batcher = Batcher(answer, models, flags.slots, flags.queue, flags.request_tokens, flags.total_tokens)
        with closing(service.batcher) as batcher:  # Python aborts where it ends while another thread is in torch
            batcher.expect(service.model)
            if cfg.host not in HERE and not flags.api_key:
                why = "任何人都能使用 anyone who reaches this host can use it; give --api_key"
                print(f"警告 warning: {why}", file=sys.stderr)
            told = stop_signal()
            print(f"服务地址 listening on {server.address}/ (/docs, /v1, /nlg/text_generate)", flush=True)
            told.wait()
            drain(server, service, cast(Watch, app.wsgi_app), flags.drain_seconds)


def _let_in(service: Service) -> None:
    """RequestRefusedError where the key is missing or wrong, nothing is there, or nobody is there to answer."""
    path = request.url_rule.rule if request.url_rule else "other"
    request.environ["service.record"]["path"] = path
    if service.api_key and path not in OPEN and request.method != "OPTIONS":
        given = request.headers.get("Authorization", "").encode("latin-1", "replace")
        known = [key for key in service.api_key if hmac.compare_digest(given, f"Bearer {key}".encode())]
        if not known:
            why = "密钥不对 wrong or missing key; send Authorization: Bearer KEY"
            raise RequestRefusedError(why, 401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        request.environ["service.client"] = known[0]
    if path == "other":
        _refuse_slash(request.path)
    if path in GENERATING and request.method == "POST" and service.state != "ok":
        why = f"服务没有就绪 the service is not ready: {service.state}"
        raise RequestRefusedError(why, 503, code=service.state, headers={"Retry-After": "5"})


def _refuse_slash(path: str) -> None:
    """RequestRefusedError where only a slash at its end parts the path from one that is served."""
    bare = path.rstrip("/")
    if bare and bare != path and current_app.url_map.bind("").test(bare, request.method):
        why = f"{bare}/: 末尾多了斜杠 ends with a slash; ask without it: {bare}"
        raise RequestRefusedError(why, 404, code="not_found")


def _with_cors(service: Service, response: Response) -> Response:
    """Lets pages of `service.cors` in, where an operator asked for it."""
    if service.cors:
        response.headers["Access-Control-Allow-Origin"] = service.cors
        asked = request.headers.get("Access-Control-Request-Headers")  # clients of OpenAI's have many of their own
        response.headers["Access-Control-Allow-Headers"] = asked or "Authorization, Content-Type, X-Request-ID"
        response.headers["Access-Control-Expose-Headers"] = "X-Request-ID"
        response.vary.add("Origin")
    return response


def _add_pages(app: Flask, service: Service, counts: Counts) -> None:
    @app.get("/health")
    def health() -> Response:
        return json_response(
            {"status": service.state, "model": service.run_name}, 200 if service.state == "ok" else 503
        )

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(counts.text(), mimetype="text/plain; version=0.0.4")

    @app.get("/openapi.json")
    def openapi() -> Response:
        return json_response(document(service.fields, openai_requests.CHAT, openai_requests.COMPLETION))

    @app.get("/docs")
    def docs() -> Response:
        return _page((PAGES / "docs.html").read_text(encoding="utf-8"))

    @app.get("/")
    def chat_page() -> Response:
        text = (PAGES / "chat.html").read_text(encoding="utf-8")
        return _page(text.replace("{{defaults}}", json.dumps(vars(service.defaults))))


def _page(text: str) -> Response:
    page = Response(text, mimetype="text/html")
    page.headers["Content-Security-Policy"] = CSP
    return page


def _add_models(app: Flask, service: Service) -> None:
    started = int(time.time())

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "local"}

    @app.get("/v1/models")
    def models() -> Response:
        listed = sorted(service.loaded.models, key=lambda name: name != service.model)
        return json_response({"object": "list", "data": [described(name) for name in listed]})

    @app.get("/v1/models/<path:name>")
    def model(name: str) -> Response:
        return json_response(described(service.model_called(name)))


def _add_answers(app: Flask, service: Service) -> None:
    @app.post("/nlg/text_generate")
    def nlg() -> Response:
        return _text_of(service)

    @app.post("/v1/chat/completions")
    def chat_completions() -> Response:
        return _complete(service, openai_requests.read_chat)

    @app.post("/v1/completions")
    def completions() -> Response:
        return _complete(service, openai_requests.read_completion)


def _text_of(service: Service) -> Response:
    """Answer the current request of POST /nlg/text_generate: one JSON string, or text and thought where it thought."""
    body, batcher = read_json(request), service.loaded
    turns, sampling = text_generate.read_request(body, service.fields, service.defaults.repetition_penalty)
    try:
        ids = batcher.encoder.whole_ids(turns)
    except RowError as problem:  # the model's chat template does not take it
        raise RequestRefusedError(f"instruction: {problem}", param="instruction", code="invalid_text") from None
    asked = "max_new_tokens" if "max_new_tokens" in body else ""
    ask = Ask(ids, openai_requests.fitted(sampling, len(ids), batcher.context, asked))
    ticket = _submit(service, service.model, [ask])
    parts = [part for more in ticket.parts(_gone()) for part in more]
    text, thought = "".join(part.text for part in parts), "".join(part.thought for part in parts)
    return json_response({"text": text, "reasoning_content": thought} if thought else text)


def _complete(service: Service, read: Callable[[dict[str, Any], Batcher, Sampling], Wanted]) -> Response:
    """Answer the current request for a chat or a completion, whose body `read` reads."""
    body = read_json(request)
    penalty = service.penalties.get(str(body.get("model")), service.defaults.repetition_penalty)
    wanted = read(body, service.loaded, replace(service.defaults, repetition_penalty=penalty))
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
    return json_response(shape.whole([part for more in parts for part in more], ticket))


def _submit(service: Service, model: str, asks: list[Ask]) -> Ticket:
    """The Ticket of some Asks; RequestRefusedError where they cannot be taken. The log line will tell of it."""
    try:
        ticket = service.loaded.submit(model, asks, service.seconds, request.environ.get("service.client", ""))
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
            yield _event(shape.last_chunk(ticket))
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
