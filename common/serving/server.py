"""A production WSGI server around the app: limits, errors in JSON, and an end that lets answers finish."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

import waitress
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.task import ErrorTask

from common.errors import UserError
from common.serving.failures import error_object
from common.serving.validation import LIMIT

if TYPE_CHECKING:
    from flask import Flask

    from common.serving.app import Service
    from common.serving.middleware import Watch

HEADERS = 32 << 10  # bytes of a request's headers
IDLE = 60  # seconds a connection may say nothing


class _ErrorTask(ErrorTask):
    """waitress' own refusals (headers, lengths, encodings), in the shape of all others."""

    def execute(self) -> None:
        problem = self.request.error
        body = json.dumps(error_object(str(problem.body), problem.code, code=problem.reason.lower().replace(" ", "_")))
        self.status = f"{problem.code} {problem.reason}"
        self.response_headers += [("Content-Type", "application/json"), ("X-Request-ID", uuid.uuid4().hex)]
        self.set_close_on_finish()
        self.content_length = len(body)  # type: ignore[assignment]  # the class itself starts it with None
        self.write(body.encode())


class _Channel(HTTPChannel):
    error_task_class = _ErrorTask


class Server:
    """waitress on a host and port (0: a free one), from the start in a thread of its own.

    requests: how many may be under way; as many threads and a few more, so that /health is always answered. UserError
    where nothing can listen there.
    """

    def __init__(self, app: Flask, host: str, port: int, requests: int) -> None:
        self.sockets: dict[int, Any] = {}  # waitress' listeners and connections by file number
        try:
            self.server = waitress.create_server(
                app,
                map=self.sockets,
                host=host,
                port=port,
                threads=requests + 16,
                connection_limit=4 * requests + 512,
                backlog=1024,
                channel_request_lookahead=1,  # reads on while a request runs, and so sees a client leave
                channel_timeout=IDLE,
                cleanup_interval=10,
                max_request_header_size=HEADERS,
                max_request_body_size=16 * LIMIT,  # the app's own, smaller limit lets a client read the answer
                inbuf_overflow=LIMIT >> 3,
                asyncore_use_poll=True,
                ident=None,
            )
        except OSError as problem:
            raise UserError(
                f"{host}:{port}: 无法监听 cannot listen: {problem}; give another --host or --port"
            ) from None
        for listener in self._all("effective_port"):
            listener.channel_class = _Channel
        self.host = host
        self.port = getattr(self.server, "effective_port", port)
        self.closing = False
        self.thread = threading.Thread(target=self._run, name="waitress", daemon=True)
        self.thread.start()

    @property
    def address(self) -> str:
        """http://host:port"""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    def unsent(self) -> int:
        """Bytes that wait to be sent."""
        return sum(channel.total_outbufs_len for channel in self._all("total_outbufs_len"))

    def close(self) -> None:
        """Close all connections and stop listening."""
        self.closing = True
        for listener in self._all("effective_port"):
            listener.pull_trigger()
        self.thread.join()

    def _run(self) -> None:
        while not self.closing:
            wasyncore.loop(timeout=1, use_poll=True, map=self.sockets, count=1)
        self.server.task_dispatcher.shutdown(timeout=1)
        wasyncore.close_all(self.sockets)

    def _all(self, attribute: str) -> list[Any]:
        """Sockets that have an attribute: effective_port picks the listeners, total_outbufs_len the connections."""
        return [one for one in list(self.sockets.values()) if hasattr(one, attribute)]


def stop_signal() -> threading.Event:
    """Set by SIGTERM or Ctrl-C, from now on. A second one ends the process at once."""
    told = threading.Event()

    def first(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        told.set()

    signal.signal(signal.SIGTERM, first)
    signal.signal(signal.SIGINT, first)
    return told


def drain(server: Server, service: Service, watch: Watch, seconds: float) -> None:
    """Refuse new requests, let those under way finish, for at most so many seconds."""
    service.draining = True
    print(f"正在结束 draining {watch.under_way} request(s), at most {seconds} s", file=sys.stderr, flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end and (watch.under_way or server.unsent()):
        time.sleep(0.05)
    server.close()


def log_to_stderr() -> None:
    """One line a request, after its time and level."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("waitress").setLevel(logging.ERROR)
