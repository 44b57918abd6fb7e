"""The HTTP service: one Flask app over a Service. Its routes, who may use them, and its life from start to end."""

from __future__ import annotations

import hmac
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from flask import Flask, Response, request

from common.config import SFTConfig
from common.engine.batcher import Batcher
from common.inference.answerer import Answerer, Sampling
from common.serving import adapters, openai_requests, tracing
from common.serving.failures import RequestRefusedError, add_error_handlers, json_response
from common.serving.middleware import Counts, Watch
from common.serving.openapi import document
from common.serving.server import Server, drain, log_to_stderr, until_told
from common.serving.service import Service, complete, text_generate
from common.serving.text_generate import FIELDS
from common.serving.validation import LIMIT

if TYPE_CHECKING:
    from common.config import ServeFlags
    from common.inference.remote import Remote

PAGES = Path(__file__).with_name("pages")
OPEN = ("/", "/docs", "/openapi.json", "/health")  # served without a key: they hold no text of a user
GENERATING = ("/nlg/text_generate", "/v1/chat/completions", "/v1/completions")
CSP = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
HERE = ("127.0.0.1", "localhost", "::1")  # hosts that other machines cannot reach

Config = TypeVar("Config", bound=SFTConfig)  # a family's own


def create_app(service: Service) -> Flask:
    """The Flask app of a Service; its wsgi_app is a Watch."""
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = LIMIT
    app.url_map.merge_slashes = False  # a redirect is no answer to a client of an API
    counts = Counts(
        lambda: len(service.batcher.waiting) if service.batcher else 0,
        lambda: service.batcher.active_count if service.batcher else 0,
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
        api_key=flags.api_key,
        cors=flags.cors,
        seconds=flags.request_seconds,
        log_text=flags.log_text,
    )
    app = create_app(service)
    server = Server(app, cfg.host, cfg.port, flags.slots + flags.queue)
    try:
        answer = cast(Answerer, load_answer(cfg, flags.base))
        models = adapters.load(answer, flags.adapters, service.model)
        service.batcher = Batcher(answer, models, flags.slots, flags.queue, flags.request_tokens, flags.total_tokens)
        if cfg.host not in HERE and not flags.api_key:
            print(
                "警告 warning: 任何人都能使用 anyone who reaches this host can use it; give --api_key", file=sys.stderr
            )
        print(f"服务地址 listening on {server.address}/ (/docs, /v1, /nlg/text_generate)", flush=True)
        until_told()
        drain(server, service, cast(Watch, app.wsgi_app), flags.drain_seconds)
    finally:
        server.close()


def _let_in(service: Service) -> None:
    """RequestRefusedError where the key is missing or wrong, or nobody is there to answer."""
    path = request.url_rule.rule if request.url_rule else "other"
    request.environ["service.record"]["path"] = path
    if service.api_key and path not in OPEN and request.method != "OPTIONS":
        given = request.headers.get("Authorization", "").encode("latin-1", "replace")
        if not hmac.compare_digest(given, f"Bearer {service.api_key}".encode()):
            why = "密钥不对 wrong or missing key; send Authorization: Bearer KEY"
            raise RequestRefusedError(why, 401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
    if path in GENERATING and request.method == "POST" and service.state != "ok":
        why = f"服务没有就绪 the service is not ready: {service.state}"
        raise RequestRefusedError(why, 503, code=service.state, headers={"Retry-After": "5"})


def _with_cors(service: Service, response: Response) -> Response:
    """Lets pages of `service.cors` in, where an operator asked for it."""
    if service.cors:
        response.headers["Access-Control-Allow-Origin"] = service.cors
        response.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type, X-Request-ID"
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
        return json_response(document(FIELDS, openai_requests.CHAT, openai_requests.COMPLETION))

    @app.get("/docs")
    def docs() -> Response:
        return _page("docs.html")

    @app.get("/")
    def chat_page() -> Response:
        return _page("chat.html")


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
        return text_generate(service)

    @app.post("/v1/chat/completions")
    def chat_completions() -> Response:
        return complete(service, openai_requests.read_chat)

    @app.post("/v1/completions")
    def completions() -> Response:
        return complete(service, openai_requests.read_completion)


def _page(name: str) -> Response:
    page = Response((PAGES / name).read_bytes(), mimetype="text/html")
    page.headers["Content-Security-Policy"] = CSP
    return page
