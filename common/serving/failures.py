"""What a client is told where a request is not answered: OpenAI's error object and a status, never a traceback."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from common.engine.request import ClientGoneError, ModelFailedError, RequestTimeoutError
from common.errors import UserError

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
FAILURES: dict[type[Exception], tuple[str, int, str]] = {  # what ends a request: (message, status, code)
    ModelFailedError: ("模型出错 the model failed; see the server's log", 500, "model_failed"),
    RequestTimeoutError: ("超时 the request took too long", 503, "timeout"),
    ClientGoneError: ("客户端已离开 the client has left", 499, "client_gone"),
}
log = logging.getLogger("service")


class RequestRefusedError(Exception):
    """A request that is not answered: what the client is told, in the shape of OpenAI's errors.

    status: of HTTP. param: the field to blame. code: a word programs can look for. headers: more of them.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param and param[:64].encode("utf-8", "replace").decode()
        self.code = code
        self.headers = dict(headers or {})


def error_object(message: str | None, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def json_response(value: Any, status: int = 200) -> Response:
    """A value as a response; characters beyond ASCII are written as they are."""
    return Response(json.dumps(value, ensure_ascii=False), status, mimetype="application/json")


def add_error_handlers(app: Flask) -> None:
    """Let the app answer every exception of a request by an error object."""

    @app.errorhandler(RequestRefusedError)
    def refused(error: RequestRefusedError) -> Response:
        return _response(str(error), error.status, error.param, error.code, error.headers)

    def ended(error: Exception) -> Response:
        message, status, code = FAILURES[type(error)]
        return _response(message, status, code=code)

    for kind in FAILURES:
        app.register_error_handler(kind, ended)

    @app.errorhandler(UserError)
    def user_error(error: UserError) -> Response:
        return _response(str(error), 400)

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        allow = {name: value for name, value in error.get_headers() if name == "Allow"}
        code = error.name.lower().replace(" ", "_")
        return _response(error.description, error.code or 500, code=code, headers=allow)

    @app.errorhandler(Exception)
    def failure(error: Exception) -> Response:
        log.exception("request %s failed", request.environ["service.record"]["id"])
        return _response("服务内部错误 internal error; see the server's log", 500, code="internal_error")


def _response(
    message: str | None,
    status: int,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    response = json_response(error_object(message, status, param, code), status)
    response.headers.update(headers or {})
    return response
