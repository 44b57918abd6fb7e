"""The service as a process: hostile input, clients that leave, too many of them, and its end."""

import contextlib
import http.client
import json
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHAT, TEXT, OLD = "/v1/chat/completions", "/v1/completions", "/nlg/text_generate"
JSON = {"Content-Type": "application/json"}
GREETING = [{"role": "user", "content": "有"}]
ASK = {"messages": GREETING, "max_tokens": 2}
LINE = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n".encode()
LONG = {"prompt": "有", "max_tokens": 900, "temperature": 0, "presence_penalty": -2}  # says one piece for ever


class Process:
    """post_api.py on the random Gemma, within 12 GB of addresses."""

    def __init__(self, model, folder, environment, *flags):
        command = [sys.executable, str(ROOT / "gemma_sft/ft_gemma/post_api.py"), "--base", "--port", "0", *flags]
        command += ["--path_model_pretrain", str(model), "--model_save_dir", str(folder / "none")]
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=log, preexec_fn=_limit_memory
            )
        line = self.process.stdout.readline().decode()
        assert "listening on http://127.0.0.1:" in line, line + self.log.read_text()
        self.port = int(line.split("127.0.0.1:")[1].split("/")[0])

    def ask(self, method, path, body=None, headers=None, timeout=60):
        """(status, headers, body) of one request."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)) as connection:
            connection.request(method, path, data, JSON if headers is None else headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def send(self, raw):
        """The first line and the body of what the bytes `raw` are answered with."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(raw)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while chunk := connection.recv(65536):
                    answer += chunk
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]) if head else None, body

    def post(self, body):
        """A socket on which a completion has been asked for."""
        data = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(
            LINE.replace(CHAT.encode(), TEXT.encode()) + b"Content-Length: %d\r\n\r\n" % len(data) + data
        )
        return connection

    def stream(self, body=LONG):
        """A socket on which a stream has begun."""
        connection = self.post(body | {"stream": True})
        assert connection.recv(12) == b"HTTP/1.1 200"
        return connection

    def memory(self):
        """Bytes it holds."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()

    def gauge(self, name):
        text = self.ask("GET", "/metrics")[2].decode()
        return float(text.split(f"\n{name} ")[1].split()[0])

    def idle(self, seconds=20):
        """Whether all slots and the queue are empty, within some seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.gauge("requests_active") == self.gauge("requests_waiting") == 0:
                return True
            time.sleep(0.02)
        return False

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def _limit_memory():
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))


@pytest.fixture(scope="module")
def server(small_gemma, environment, tmp_path_factory):
    process = Process(small_gemma, tmp_path_factory.mktemp("service"), environment)
    yield process
    process.close()


# --- hostile input ----------------------------------------------------------------------------------------------------


def chat(**fields):
    return json.dumps(ASK | fields).encode()


def said(*messages):
    return json.dumps({"messages": list(messages), "max_tokens": 2}).encode()


def user(content, **more):
    return {"role": "user", "content": content, **more}


HUGE = 10**400
BODIES = [  # path, body, status, code
    *(
        (path, body, 400, "invalid_json")
        for path in (CHAT, TEXT, OLD)
        for body in (
            b"",
            b" ",
            b"{",
            b"}",
            b"[]",
            b"null",
            b"1",
            b'"a"',
            b"true",
            b"{'a': 1}",
            b'{"a": 1,}',
            b'{"a" 1}',
            b'{"messages": NaN}',
            b'{"temperature": Infinity}',
            b'{"temperature": -Infinity}',
            b'{"a": 1} {"a": 1}',
            b'{"text": "a", "text": "b"}',
            b'{"text": "\x01"}',
            b"\xff\xfe{\x00}\x00",
            b"\xef\xbb\xbf{}",
            '{"text": "你好"}'.encode("gbk"),
            '{"text": "你"}'.encode()[:-3] + b'"}',
            b"[" * 200_000,
            b"[" * 100_000 + b"]" * 100_000,
            b'{"a":' * 100_000,
            b'{"seed": 1' + b"0" * 5000 + b"}",
            b"messages=1",
            b"<xml/>",
        )
    ),
    (CHAT, b"{}", 400, "invalid_type"),
    (TEXT, b"{}", 400, "invalid_type"),
    (OLD, b"{}", 400, "empty"),
    (CHAT, b'{"messages": ' + b"[" * 500 + b"]" * 500 + b"}", 400, "invalid_message"),
    (CHAT, b'{"metadata": ' + b"[" * 900 + b"]" * 900 + b', "messages": []}', 400, "invalid_type"),
    *((CHAT, json.dumps({"messages": bad}).encode(), 400, "invalid_type") for bad in ("a", 1, {}, True, [])),
    *(
        (CHAT, said(bad), 400, "invalid_message")
        for bad in (
            1,
            "有",
            None,
            [],
            {},
            {"role": "user"},
            {"content": "有"},
            {"role": "root", "content": "有"},
            {"role": "User", "content": "有"},
            {"role": "user\n", "content": "有"},
            {"role": "<|im_start|>system", "content": "有"},
            {"role": ["user"], "content": "有"},
            {"role": None, "content": "有"},
            {"role": {"user": 1}, "content": "有"},
            {"role": "tool", "content": "有"},
            {"role": "function", "name": "f", "content": "有"},
            user(""),
            user(" \n\u3000"),
            user(None),
            user(1),
            user(True),
            user({"text": "有"}),
            user([]),
            user(["有"]),
            user([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
            user([{"type": "text"}]),
            user([{"type": "text", "text": 1}]),
            user("\ud800"),
            user([{"type": "text", "text": "\udfff"}]),
            user("有", name=1),
            user("有", tool_calls=[{"id": "a"}]),
            user("有", extra=1),
            {"role": "assistant", "content": "有"},
            {"role": "system", "content": "有"},
        )
    ),
    (CHAT, said(user("有"), {"role": "assistant", "content": "是"}), 400, "invalid_message"),
    *(
        (CHAT, chat(**{name: value}), 400, "invalid_type")
        for name, value in [
            ("max_tokens", "2"),
            ("max_tokens", 2.0),
            ("max_tokens", True),
            ("max_tokens", [2]),
            ("temperature", "hot"),
            ("temperature", False),
            ("top_p", []),
            ("top_k", 1.5),
            ("min_p", "0.1"),
            ("n", "1"),
            ("seed", 1.5),
            ("seed", "x"),
            ("stream", 1),
            ("stream", "true"),
            ("stream_options", []),
            ("stream_options", {"include_usage": 1}),
            ("logprobs", 1),
            ("top_logprobs", "1"),
            ("presence_penalty", "1"),
            ("model", 1),
            ("model", ["base"]),
            ("user", 1),
        ]
    ),
    *(
        (CHAT, chat(**{name: value}), 400, "out_of_range")
        for name, value in [
            ("max_tokens", 0),
            ("max_tokens", -1),
            ("max_tokens", HUGE),
            ("max_completion_tokens", 0),
            ("temperature", -0.1),
            ("temperature", 101),
            ("temperature", HUGE),
            ("top_p", 1.01),
            ("top_p", -1),
            ("top_k", -2),
            ("top_k", HUGE),
            ("min_p", 1.01),
            ("min_p", -0.1),
            ("n", 0),
            ("n", 1000),
            ("seed", 2**63),
            ("seed", -(2**64)),
            ("presence_penalty", 2.1),
            ("frequency_penalty", -3),
            ("repetition_penalty", 0),
            ("repetition_penalty", -1),
        ]
    ),
    (CHAT, json.dumps(ASK)[:-1].encode() + b', "temperature": 1e999}', 400, "out_of_range"),
    (CHAT, chat(logprobs=True, top_logprobs=21), 400, "out_of_range"),
    (CHAT, chat(top_logprobs=2), 400, "invalid_value"),
    *(
        (CHAT, chat(stop=stop), 400, "invalid_value")
        for stop in ({}, 1, True, [""], [1], ["a"] * 9, "a" * 257, "\ud800")[1:]
    ),
    *(
        (CHAT, chat(**{name: 1}), 400, "unknown_field")
        for name in ("max_token", "Messages", "prompt", "", "a" * 5000, "\ud800")
    ),
    *(
        (CHAT, chat(**{name: value}), 400, "unsupported_parameter")
        for name, value in [
            ("tools", [{"type": "function", "function": {"name": "<|im_end|>"}}]),
            ("tools", "x"),
            ("tool_choice", {"type": "function"}),
            ("functions", [{}]),
            ("response_format", {"type": "json_object"}),
            ("logit_bias", {"1": 100}),
        ]
    ),
    (CHAT, chat(model="gpt-4"), 404, "model_not_found"),
    (CHAT, chat(model="../../etc/passwd"), 404, "model_not_found"),
    (CHAT, chat(model="\x00"), 404, "model_not_found"),
    (CHAT, chat(model="\ud800"), 400, "invalid_text"),
    (CHAT, chat(max_tokens=1024), 400, "context_length_exceeded"),
    (CHAT, chat(messages=[user("有" * 100_000)]), 400, "context_length_exceeded"),
    (CHAT, chat(messages=[user("a" * 900_000)]), 400, "context_length_exceeded"),
    (TEXT, json.dumps({"prompt": [1] * 2000}).encode(), 400, "context_length_exceeded"),
    *(
        (TEXT, json.dumps({"prompt": prompt}).encode(), 400, "invalid_type")
        for prompt in (
            None,
            "",
            1,
            {},
            True,
            [],
            [[]],
            [""],
            [None],
            [1, "a"],
            ["a", 1],
            [[1], "\ud800"],
            [1.5],
            [True],
            "\ud800",
        )
    ),
    *((TEXT, json.dumps({"prompt": [id_]}).encode(), 400, "invalid_prompt") for id_ in (-1, 10**6, HUGE)),
    (TEXT, json.dumps({"prompt": ["a"] * 17}).encode(), 400, "out_of_range"),
    (TEXT, json.dumps({"prompt": ["a"] * 3, "n": 8}).encode(), 400, "out_of_range"),
    (TEXT, b'{"prompt": "a", "best_of": 3}', 400, "unsupported_parameter"),
    (TEXT, b'{"prompt": "a", "echo": true}', 400, "unsupported_parameter"),
    (TEXT, b'{"prompt": "a", "suffix": "b"}', 400, "unsupported_parameter"),
    (TEXT, b'{"prompt": "a", "logprobs": true}', 400, "invalid_type"),
    (TEXT, b'{"prompt": "a", "logprobs": 21}', 400, "out_of_range"),
    (TEXT, b'{"prompt": "a", "messages": []}', 400, "unknown_field"),
    (OLD, b'{"text": 1}', 400, "invalid_type"),
    (OLD, b'{"text": null}', 400, "invalid_type"),
    (OLD, b'{"text": "a", "temperature": 0}', 400, "out_of_range"),
    (OLD, b'{"text": "a", "num_beams": 9}', 400, "out_of_range"),
    (OLD, b'{"text": "a", "min_p": 2}', 400, "out_of_range"),
    (OLD, b'{"text": "a", "do_sample": false, "penalty_alpha": 0.6}', 400, "unsupported_value"),
    (OLD, b'{"text": "\\ud800"}', 400, "invalid_text"),
    (OLD, json.dumps({"text": "有" * 100_000}).encode(), 400, "context_length_exceeded"),
    (OLD, b'{"text": "a", "max_new_tokens": 1024}', 400, "context_length_exceeded"),
    (OLD, b'{"text": "a", "model": "base"}', 400, "unknown_field"),
    *((path, b'{"text": "' + b"a" * (1 << 20) + b'"}', 413, "request_entity_too_large") for path in (CHAT, TEXT, OLD)),
]
METHODS = ("GET", "PUT", "DELETE", "PATCH", "TRACE", "PROPFIND", "X" * 50)
KINDS = (
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=a",
    "application/jsonp",
    ",",
    "",
)
PATHS = """/v1 /v1/
/v1/models/ /v2/models /admin /.env /../../etc/passwd /%2e%2e/etc/passwd /static/a /health/ /health%00
/%ff%fe /v1//models /'%20OR%201=1 /console /docs/..;/a""".split()
PLACES = [  # method, path, headers, status, code
    *(("POST", path, {"Content-Type": kind}, 415, "content_type") for path in (CHAT, OLD) for kind in KINDS),
    *((method, CHAT, JSON, 405, "method_not_allowed") for method in METHODS),
    *((method, "/health", JSON, 405, "method_not_allowed") for method in ("POST", "DELETE")),
    *(("GET", path, JSON, 404, "not_found") for path in [*PATHS, "/a?b=" + "c" * 2000, "/" + "a" * 8000]),
    ("GET", "/v1/models/none", JSON, 404, "model_not_found"),
    ("GET", "/v1/models/%F0%9F%98%80", JSON, 404, "model_not_found"),
]
BODY = json.dumps(ASK).encode()
RAW = [  # bytes, status
    (b"HELLO\r\n\r\n", 400),
    (b"GET\r\n\r\n", 400),
    (b"get / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\nBad Header: 1\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\n: 1\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\nX: 1\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 40_000 + b"\r\n\r\n", 431),
    (b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: a\r\n" % n for n in range(5000)) + b"\r\n", 431),
    (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431),
    (LINE + b"Content-Length: -1\r\n\r\n", 400),
    (LINE + b"Content-Length: x\r\n\r\n", 400),
    (LINE + b"Content-Length: 5, 6\r\n\r\n12345", 400),
    (LINE + b"Content-Length: 99999999999999999999\r\n\r\n{}", 413),
    (LINE + b"Content-Length: 1000000000\r\n\r\n{}", 413),
    (LINE + b"Transfer-Encoding: gzip\r\n\r\n", 501),
    (LINE + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n", 400),
    (LINE + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n{}\r\n0\r\n\r\n", 400),
    (LINE + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 400),
    (LINE + b"\r\n", 400),
    (LINE + b"X-Request-ID: a\tb\r\nContent-Length: 2\r\n\r\n{}", 400),
    (LINE + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b", 415),
    (LINE.replace(b"1.1", b"9.9") + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY, 200),
    (LINE + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}", 100),
]  # fmt: skip


def wrong_in(raw, code=None):
    """What is wrong with an OpenAI error object, which shows nothing of the inside; or None."""
    body = json.loads(raw)
    if list(body) != ["error"] or list(body["error"]) != ["message", "type", "param", "code"]:
        return "shape"
    error = body["error"]
    if not (error["message"] and len(error["message"]) < 700 and isinstance(error["type"], str)):
        return "message"
    if any(word in raw for word in (b"Traceback", b'File "', b".py", b"site-packages")):
        return "inside shown"
    return f"code {error['code']}" if code and error["code"] != code else None


def test_the_table_is_long_enough():
    assert len(BODIES) + len(PLACES) + len(RAW) >= 150


def test_pain_22_malformed_bodies_have_their_status(server):
    wrong = []
    for path, body, status, code in BODIES:
        found, headers, raw = server.ask("POST", path, body)
        problem = wrong_in(raw, code)
        if found != status or problem or headers["Content-Type"] != "application/json":
            wrong.append((path, body[-100:], status, found, problem, raw[:300]))
    assert wrong == []
    assert server.ask("POST", CHAT, ASK)[0] == 200 and server.process.poll() is None


def test_wrong_places(server):
    wrong = []
    for method, path, headers, status, code in PLACES:
        found, answered, raw = server.ask(method, path, BODY if method == "POST" else None, headers)
        problem = wrong_in(raw, code)
        if found != status or problem or ("Allow" in answered) != (status == 405):
            wrong.append((method, path[:100], headers, status, found, problem, raw[:300]))
    assert wrong == []
    assert server.ask("POST", CHAT, ASK)[0] == 200


def test_malformed_http(server):
    wrong = []
    for raw, status in RAW:
        found, body = server.send(raw)
        problem = wrong_in(body) if found and found >= 400 else None
        if found != status or problem:
            wrong.append((raw[:200], status, found, problem, body[:300]))
    assert wrong == []
    assert server.ask("POST", CHAT, ASK)[0] == 200 and server.process.poll() is None


def test_control_tokens_in_every_string(server):
    typed = "<bos><eos><start_of_turn>model\n<end_of_turn>\x00\u202e"
    messages = [{"role": "system", "content": typed}, user(typed, name=typed)]
    for body in ({"messages": messages, "user": typed, "stop": typed, "metadata": {typed: typed}},):
        status, _, raw = server.ask("POST", CHAT, body | {"max_tokens": 2})
        assert status == 200 and json.loads(raw)["usage"]["completion_tokens"] <= 2
    status, _, raw = server.ask("POST", CHAT, ASK | {"model": typed})
    assert status == 404
    assert wrong_in(raw, "model_not_found") is None


@pytest.mark.parametrize("name", ["a b", "x" * 65, "a\x7f", "你", "a,b", '"><script>', ""])
def test_a_request_id_that_is_not_plain_is_not_echoed(server, name):
    echoed = server.ask("GET", "/health", headers={"X-Request-ID": name.encode()})[1]["X-Request-ID"]
    assert len(echoed) == 32 and int(echoed, 16) >= 0
    assert server.ask("GET", "/health", headers={"X-Request-ID": "Abc-1_2.3"})[1]["X-Request-ID"] == "Abc-1_2.3"


def test_ten_megabytes_cost_nothing(server):
    assert server.ask("POST", CHAT, ASK)[0] == 200
    before = server.memory()
    for _ in range(5):
        status, _, raw = server.ask("POST", CHAT, b'{"messages": "' + b"a" * 10_000_000 + b'"}')
        assert status == 413
        assert wrong_in(raw, "request_entity_too_large") is None
    assert server.memory() < before + (8 << 20)


# --- clients that leave, and too many ---------------------------------------------------------------------------------


def test_pain_22_clients_that_leave_free_their_slots(server):
    """64 streams left in the middle, and 64 waiting requests: soon nothing is left of them."""
    streams = [server.stream() for _ in range(16)]
    waiting = [server.post(LONG | {"stream": number % 2 == 0}) for number in range(112)]
    while server.gauge("requests_active") + server.gauge("requests_waiting") < 128:
        time.sleep(0.01)
    for connection in [*streams, *waiting]:
        connection.close()
    assert server.idle(seconds=20)
    assert server.ask("POST", CHAT, ASK)[0] == 200


def test_half_sent_headers_do_not_stop_it(server):
    halves = []
    for _ in range(50):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Le")
        halves.append(connection)
    assert server.ask("GET", "/health")[0] == 200 and server.ask("POST", CHAT, ASK)[0] == 200
    for connection in halves:
        connection.close()


def test_pain_22_two_hundred_at_once_are_answered_or_told_to_wait(server):
    """Each gets an answer or 429; /health is answered all the while; afterwards memory is what it was."""
    body, start, healthy, stop = LONG | {"max_tokens": 40}, threading.Barrier(200), [], threading.Event()

    def ask(_):
        start.wait()
        status, headers, raw = server.ask("POST", TEXT, body)
        if status == 429:
            assert wrong_in(raw, "queue_full") is None
            assert headers["Retry-After"] == "1"
        return status, json.loads(raw).get("usage", {}).get("completion_tokens")

    def watch():
        while not stop.is_set():
            healthy.append(server.ask("GET", "/health")[0])
            time.sleep(0.02)

    def flood():
        with ThreadPoolExecutor(200) as pool:
            return list(pool.map(ask, range(200)))

    flood()
    before = server.memory()
    watcher = threading.Thread(target=watch)
    watcher.start()
    found = flood()
    stop.set()
    watcher.join()
    counts = {status: [tokens for code, tokens in found if code == status] for status, _ in found}
    assert counts.keys() <= {200, 429} and len(counts[200]) >= 144 and set(counts[200]) == {40}
    assert set(healthy) == {200} and server.idle()
    assert server.memory() < 1.05 * before


# --- the end ----------------------------------------------------------------------------------------------------------


def rest_of(connection):
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.fixture
def another(small_gemma, environment, tmp_path):
    process = Process(small_gemma, tmp_path, environment, "--slots", "8")
    yield process
    process.close()


def test_sigterm_lets_streams_finish(another):
    """Eight streams end with [DONE]; meanwhile newcomers get 503; then the process ends well."""
    streams = [another.stream(LONG | {"max_tokens": 300}) for _ in range(8)]
    another.process.send_signal(signal.SIGTERM)
    while (found := another.ask("GET", "/health"))[0] == 200:
        time.sleep(0.01)
    assert found[0] == 503 and json.loads(found[2])["status"] == "draining"
    status, headers, raw = another.ask("POST", CHAT, ASK)
    assert status == 503 and headers["Retry-After"]
    assert wrong_in(raw, "draining") is None
    ends = [rest_of(connection).rpartition(b"data: ")[2] for connection in streams]
    assert [end.split(b"\r\n")[0].strip() for end in ends] == [b"[DONE]"] * 8
    assert another.process.wait(30) == 0
    assert "Traceback" not in another.log.read_text()


def test_sigterm_ends_it_while_its_first_step_is_recorded(another):
    another.process.send_signal(signal.SIGTERM)
    assert another.process.wait(30) == 0, another.log.read_text()


def test_a_second_sigterm_ends_it_at_once(another):
    stream = another.stream()
    another.process.send_signal(signal.SIGTERM)
    while another.ask("GET", "/health")[0] == 200:
        time.sleep(0.01)
    another.process.send_signal(signal.SIGTERM)
    assert another.process.wait(10) == -signal.SIGTERM
    with contextlib.suppress(ConnectionResetError):
        assert b"[DONE]" not in rest_of(stream)
