"""The HTTP service around any object called like an Answerer: one app factory, a production WSGI server."""

import difflib
import json
import logging

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from common.answer import Sampling
from common.errors import UserError
from common.shapes import Turn

LIMIT = 1 << 20  # bytes of a request body
# field: (type, default, least, most) of POST /nlg/text_generate; the originals' fields and defaults
FIELDS = {
    "instruction": (str, "", None, None),
    "text": (str, "", None, None),
    "penalty_alpha": (float, 1.0, 0, 10),
    "max_new_tokens": (int, 128, 1, 4096),
    "temperature": (float, 0.8, 0.01, 10),
    "do_sample": (bool, True, None, None),
    "num_beams": (int, 1, 1, 8),
    "top_p": (float, 0.8, 0.01, 1),
    "top_k": (int, 50, 0, 1000),
}


class BadRequest(ValueError):
    """A request that cannot be answered; its text goes to the client with status 400."""


def create_app(answer, model_name, base=False):
    """A Flask app that answers with `answer(conversations, sampling, base=…)`."""
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = LIMIT
    app.json.ensure_ascii = False

    @app.post("/nlg/text_generate")
    def text_generate():
        turns, sampling = read_request(_body())
        return _json(answer([turns], sampling, base=base)[0].text)

    @app.get("/health")
    def health():
        return _json({"status": "ok", "model": model_name})

    @app.errorhandler(BadRequest)
    @app.errorhandler(UserError)
    def bad_request(error):
        return _json({"error": str(error)}, 400)

    @app.errorhandler(HTTPException)
    def http_error(error):
        response = _json({"error": error.description}, error.code)
        response.headers.extend([pair for pair in error.get_headers() if pair[0] == "Allow"])
        return response

    @app.errorhandler(Exception)
    def failure(error):
        app.logger.exception("request failed")
        return _json({"error": "服务内部错误 internal error; see the server's log"}, 500)

    return app


def read_request(body):
    """(turns, Sampling) of a text_generate body; BadRequest names the field, what was found and what is allowed."""
    if not isinstance(body, dict):
        raise BadRequest(f"应为 JSON 对象 the body must be a JSON object, found {type(body).__name__}")
    for name in body.keys() - FIELDS.keys():
        near = difflib.get_close_matches(name, FIELDS, n=1)
        raise BadRequest(f"未知字段 unknown field {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    values = {name: _field(name, body.get(name, spec[1]), *spec) for name, spec in FIELDS.items()}
    question = "\n".join(part for part in (values.pop("instruction"), values.pop("text")) if part.strip())
    if not question:
        raise BadRequest("instruction 和 text 都是空的 are both empty")
    if values.pop("penalty_alpha") and "penalty_alpha" in body and not values["do_sample"] and values["num_beams"] == 1:
        raise BadRequest(
            "penalty_alpha: 对比搜索已不支持 contrastive search is gone from transformers; send 0, or do_sample true"
        )
    return [Turn("user", question)], Sampling(**values)


def serve(app, host, port):
    """Run `app` until SIGINT or SIGTERM; port 0 takes a free one. Prints the address once it listens."""
    import waitress

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:  # the app's own, smaller limit answers in JSON
        server = waitress.create_server(app, host=host, port=port, threads=8, max_request_body_size=16 * LIMIT)
    except OSError as problem:
        raise UserError(f"{host}:{port}: 无法监听 cannot listen: {problem}; give another --host or --port") from None
    shown = f"[{host}]" if ":" in host else host
    port = getattr(server, "effective_port", port)  # a name with several addresses has several sockets
    print(f"服务地址 listening on http://{shown}:{port}/nlg/text_generate", flush=True)
    server.run()


def _body():
    if request.mimetype != "application/json":
        raise BadRequest(f"Content-Type 应为 must be application/json, found {request.mimetype or 'none'}")
    try:
        return json.loads(request.get_data().decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise BadRequest("请求体不是 UTF-8 the body is not UTF-8") from None
    except (ValueError, RecursionError) as problem:
        raise BadRequest(f"请求体不是有效的 JSON the body is not valid JSON: {problem}") from None


def _refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


def _field(name, value, kind, default, least, most):
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise BadRequest(f"{name} 应为 must be {kind.__name__}, found {type(value).__name__} {str(value)[:40]!r}")
    if kind in (int, float) and not least <= value <= most:
        raise BadRequest(f"{name} 应在 must be between {least} 和 and {most}, found {str(value)[:40]}")
    if kind is str and not _is_unicode(value):
        raise BadRequest(f"{name} 有半个字符 holds half a character (a lone surrogate)")
    return float(value) if kind is float else value


def _is_unicode(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json(value, status=200):
    return Response(json.dumps(value, ensure_ascii=False), status, mimetype="application/json")
