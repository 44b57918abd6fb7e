"""The HTTP service: one Flask app over a Batcher. Routes, who may use them, and what each failure looks like."""

import hmac
import json
import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from common.engine.batcher import Batcher, QueueFullError
from common.engine.request import Ask, ClientGoneError, ModelFailedError, RequestTimeoutError
from common.errors import UserError
from common.inference.answerer import Sampling
from common.serving import adapters, openai_requests, openai_responses, tracing
from common.serving.middleware import Counts, Watch
from common.serving.openapi import document
from common.serving.server import Server, drain, log_to_stderr, until_told
from common.serving.text_generate import FIELDS, read_request
from common.serving.validation import LIMIT, Refused, read_json

PAGES = Path(__file__).with_name("pages")
OPEN = ("/", "/docs", "/openapi.json", "/health")  # served without a key: nothing in them is anybody's
GENERATING = ("/nlg/text_generate", "/v1/chat/completions", "/v1/completions")
CSP = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
FAILURES = {  # what ends a request: (message, status, code)
    ModelFailedError: ("模型出错 the model failed; see the server's log", 500, "model_failed"),
    RequestTimeoutError: ("超时 the request took too long", 503, "timeout"),
    ClientGoneError: ("客户端已离开 the client has left", 499, "client_gone"),
}
log = logging.getLogger("service")


@dataclass
class Service:
    """What the app serves, and how. `batcher` is None until the model is loaded.

    model: the name served where a request names none. defaults: Sampling where a request says nothing. shown: what
    /health calls the run. seconds: a request's time limit. log_text: questions and answers go into the log.
    """

    shown: str
    model: str = "tuned"
    batcher: object = None
    defaults: Sampling = field(default_factory=Sampling)
    api_key: str = ""
    cors: str = ""
    seconds: float = 600
    log_text: bool = False
    draining: bool = False

    @property
    def state(self):
        """ok, loading, draining, or dead."""
        if self.draining:
            return "draining"
        if self.batcher is None:
            return "loading"
        return "ok" if self.batcher.alive else "dead"


def create_app(service):
    """The Flask app of a Service; its wsgi_app is a Watch."""
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = LIMIT
    app.url_map.merge_slashes = False  # a redirect is no answer to a client of an API
    counts = Counts(
        lambda: len(service.batcher.waiting) if service.batcher else 0,
        lambda: service.batcher.active_count if service.batcher else 0,
    )
    app.wsgi_app = Watch(app.wsgi_app, counts, tracing.tracer())
    app.before_request(lambda: _before(service))
    app.after_request(lambda response: _with_cors(service, response))
    _add_errors(app)
    _add_pages(app, service, counts)
    _add_models(app, service)
    app.add_url_rule("/nlg/text_generate", view_func=lambda: _text_generate(service), methods=["POST"], endpoint="nlg")
    for path, read in (
        ("chat/completions", openai_requests.read_chat),
        ("completions", openai_requests.read_completion),
    ):
        app.add_url_rule(
            f"/v1/{path}", view_func=lambda read=read: _complete(service, read), methods=["POST"], endpoint=path
        )
    return app


def run(load_answer, cfg, flags):
    """What post_api.py does: listen, load, answer until told to stop, let answers finish. flags: ServeFlags.

    load_answer(cfg, base) gives the Answerer. UserError where the port is taken or the model cannot be loaded.
    """
    log_to_stderr()
    service = Service(
        shown=cfg.model_save_dir,
        model="base" if flags.base else "tuned",
        defaults=Sampling.of(cfg, num_beams=1),
        api_key=flags.api_key,
        cors=flags.cors,
        seconds=flags.request_seconds,
        log_text=flags.log_text,
    )
    app = create_app(service)
    server = Server(app, cfg.host, cfg.port, flags.slots + flags.queue)
    try:
        answer = load_answer(cfg, flags.base)
        models = adapters.load(answer, flags.adapters, service.model)
        service.batcher = Batcher(answer, models, flags.slots, flags.queue, flags.request_tokens, flags.total_tokens)
        if cfg.host not in ("127.0.0.1", "localhost", "::1") and not flags.api_key:
            print(
                "警告 warning: 任何人都能使用 anyone who reaches this host can use it; give --api_key", file=sys.stderr
            )
        print(f"服务地址 listening on {server.address}/ (/docs, /v1, /nlg/text_generate)", flush=True)
        until_told()
        drain(server, service, app.wsgi_app, flags.drain_seconds)
    finally:
        server.close()


def _before(service):
    """Who may not go on: no key, or nobody to answer."""
    path = request.url_rule.rule if request.url_rule else "other"
    request.environ["service.record"]["path"] = path
    if service.api_key and path not in OPEN and request.method != "OPTIONS":
        given = request.headers.get("Authorization", "").encode("latin-1", "replace")
        if not hmac.compare_digest(given, f"Bearer {service.api_key}".encode()):
            why = "密钥不对 wrong or missing key; send Authorization: Bearer KEY"
            raise Refused(why, 401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
    if path in GENERATING and request.method == "POST" and service.state != "ok":
        raise Refused(
            f"服务没有就绪 the service is not ready: {service.state}",
            503,
            code=service.state,
            headers={"Retry-After": "5"},
        )


def _with_cors(service, response):
    """Lets pages of `service.cors` in, where an operator asked for it."""
    if service.cors:
        response.headers["Access-Control-Allow-Origin"] = service.cors
        response.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type, X-Request-ID"
        response.headers["Access-Control-Expose-Headers"] = "X-Request-ID"
        response.vary.add("Origin")
    return response


def _add_errors(app):
    @app.errorhandler(Refused)
    def refused(error):
        return _error(str(error), error.status, error.param, error.code, error.headers)

    for kind, (message, status, code) in FAILURES.items():
        app.register_error_handler(kind, lambda _, m=message, s=status, c=code: _error(m, s, code=c))

    @app.errorhandler(UserError)
    def user_error(error):
        return _error(str(error), 400)

    @app.errorhandler(HTTPException)
    def http_error(error):
        allow = {name: value for name, value in error.get_headers() if name == "Allow"}
        return _error(error.description, error.code, code=error.name.lower().replace(" ", "_"), headers=allow)

    @app.errorhandler(Exception)
    def failure(error):
        log.exception("request %s failed", request.environ["service.record"]["id"])
        return _error("服务内部错误 internal error; see the server's log", 500, code="internal_error")


def _add_pages(app, service, counts):
    @app.get("/health")
    def health():
        return _json({"status": service.state, "model": service.shown}, 200 if service.state == "ok" else 503)

    @app.get("/metrics")
    def metrics():
        return Response(counts.text(), mimetype="text/plain; version=0.0.4")

    @app.get("/openapi.json")
    def openapi():
        return _json(document(FIELDS, openai_requests.CHAT, openai_requests.COMPLETION))

    @app.get("/docs")
    def docs():
        return _page("docs.html")

    @app.get("/")
    def chat_page():
        return _page("chat.html")


def _add_models(app, service):
    started = int(time.time())

    def described(name):
        return {"id": name, "object": "model", "created": started, "owned_by": "local"}

    def names():
        if service.batcher is None:
            raise Refused("模型还在加载 the model is still loading", 503, code="loading", headers={"Retry-After": "5"})
        return list(service.batcher.models)

    @app.get("/v1/models")
    def models():
        listed = sorted(names(), key=lambda name: name != service.model)
        return _json({"object": "list", "data": [described(name) for name in listed]})

    @app.get("/v1/models/<path:name>")
    def model(name):
        return _json(described(_known(service, name, names())))


def _known(service, name, names):
    """A model's name; the served one for ""; Refused where there is none of that name."""
    if name and name not in names:
        raise Refused(
            f"没有模型 there is no model {name[:64]!r}; there are: {', '.join(names)}", 404, "model", "model_not_found"
        )
    return name or service.model


def _text_generate(service):
    turns, sampling = read_request(read_json(request))
    ids = service.batcher.encoder.fitted_ids(turns)
    ask = Ask(ids, openai_requests.fitted(sampling, len(ids), service.batcher.context, asked=False))
    ticket = _submit(service, service.model, [ask])
    return _json("".join(part.text for parts in ticket.parts(_gone()) for part in parts))


def _complete(service, read):
    """Answer a chat or a completion, whole or as server-sent events."""
    wanted = read(read_json(request), service.batcher, service.defaults)
    model = _known(service, wanted.model, service.batcher.models)
    ticket = _submit(service, model, wanted.asks)
    shape = openai_responses.Shape(wanted, request.environ["service.record"]["id"], model, service.batcher)
    parts = ticket.parts(_gone())
    if wanted.stream:
        first = next(parts)  # what fails before has a status of its own
        response = Response(_events(first, parts, ticket, shape), mimetype="text/event-stream")
        response.headers["Cache-Control"] = "no-store"
        response.call_on_close(ticket.cancel)
        return response
    return _json(shape.whole([part for more in parts for part in more], ticket.tokens))


def _submit(service, model, asks):
    """The Ticket of some Asks; Refused where they cannot be taken. The log line will tell of it."""
    try:
        ticket = service.batcher.submit(model, asks, service.seconds)
    except QueueFullError:
        why = "服务繁忙 all slots and the queue are full; try again"
        raise Refused(why, 429, code="queue_full", headers={"Retry-After": "1"}) from None
    request.environ["service.ticket"] = ticket
    request.environ["service.log_text"] = service.log_text
    return ticket


def _gone():
    return request.environ.get("waitress.client_disconnected", lambda: False)


def _events(first, parts, ticket, shape):
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
        yield _event(openai_responses.error(message, status, code=code))
    except ClientGoneError:
        pass
    finally:
        parts.close()


def _event(*values):
    return b"".join(b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n" for value in values)


def _page(name):
    page = Response((PAGES / name).read_bytes(), mimetype="text/html")
    page.headers["Content-Security-Policy"] = CSP
    return page


def _error(message, status, param=None, code=None, headers=()):
    response = _json(openai_responses.error(message, status, param, code), status)
    response.headers.update(headers)
    return response


def _json(value, status=200):
    return Response(json.dumps(value, ensure_ascii=False), status, mimetype="application/json")
