"""The originals' endpoint: real HTTP against a real process, and every wrong request through Flask's client."""

import contextlib
import gc
import http.client
import json
import signal
import socket
import subprocess
import sys
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.cli import parse
from common.conversation.turns import Turn
from common.engine.batcher import Batcher
from common.engine.request import Ask, Part
from common.errors import UserError
from common.inference.answerer import Sampling
from common.serving import app, text_generate
from common.serving.server import Server
from common.serving.validation import LIMIT
from gemma_sft.ft_gemma.config import Config

ROOT = Path(__file__).resolve().parents[1]
URL = "/nlg/text_generate"
FULL = {  # what the clients of the original services send
    "instruction": "类型#裙*颜色#黑色",
    "text": "",
    "penalty_alpha": 1.0,
    "max_new_tokens": 12,
    "temperature": 0.8,
    "do_sample": True,
    "num_beams": 1,
    "top_p": 0.8,
    "top_k": 50,
}


class Fake:
    """In a Batcher's place and its encoder's: answers with `text`, or raises it, and remembers what it got."""

    models, context, alive, waiting, active_count = {"tuned": "default", "base": None}, 8192, True, (), 0

    def __init__(self, text="一条“黑色”裙子\n好看"):
        self.text, self.asked, self.encoder = text, [], self

    def whole_ids(self, turns):
        if isinstance(self.text, UserError):
            raise self.text
        self.turns = turns
        return [1, 2, 3]

    def submit(self, model, asks, seconds, client):
        self.asked.append((self.turns, asks[0].sampling, model))
        return FakeTicket(self.text, model)


class FakeTicket:
    """Of one answer that is there at once."""

    rows, tokens, started, created, first = (), 3, 0.0, 0.0, 0.0

    def __init__(self, text, model):
        self.text, self.model = text, model

    def parts(self, gone):
        if isinstance(self.text, BaseException):
            raise self.text
        yield [Part(0, self.text, [], "stop")]


@pytest.fixture
def fake():
    return Fake()


def client_of(batcher, model="tuned"):
    return app.create_app(app.Service("model_sft", model, batcher)).test_client()


@pytest.fixture
def client(fake):
    return client_of(fake)


def post(client, body, **kwargs):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(URL, data=data, **{"content_type": "application/json"} | kwargs)


def error_of(response):
    """The message of an OpenAI error object, which shows nothing of the inside."""
    assert response.mimetype == "application/json"
    body = json.loads(response.get_data())
    assert list(body) == ["error"] and list(body["error"]) == ["message", "type", "param", "code"]
    message = body["error"]["message"]
    assert isinstance(message, str) and message
    for word in ("Traceback", "File ", ".py", "<html", "<!doctype"):
        assert word not in message
    return message


# --- a real process -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(small_gemma, environment, tmp_path_factory):
    """(process, port) of post_api.py on the random Gemma."""
    folder = tmp_path_factory.mktemp("api")
    command = [sys.executable, str(ROOT / "gemma_sft/ft_gemma/post_api.py"), "--base", "--port", "0"]
    command += ["--path_model_pretrain", str(small_gemma), "--model_save_dir", str(folder / "none")]
    log = (folder / "log").open("w")
    with log, subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log) as process:
        try:
            line = process.stdout.readline().decode()
            assert "listening on http://127.0.0.1:" in line, line + (folder / "log").read_text()
            yield process, int(line.split("127.0.0.1:")[1].split("/")[0])
        finally:
            process.kill()


def over_http(port, method, path, body=None):
    """(status, body) of one request on a connection of its own."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


def test_post_and_health_over_http(server):
    _, port = server
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{URL}", json.dumps(FULL).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "application/json"
        assert isinstance(json.loads(response.read()), str)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as response:
        assert json.loads(response.read())["status"] == "ok"


def test_bad_requests_over_http(server):
    for method, path, body, status in [
        ("POST", URL, b"{", 400),
        ("POST", URL, "你".encode("gbk"), 400),
        ("GET", URL, None, 405),
        ("GET", "/nothing", None, 404),
        ("POST", URL, json.dumps(FULL | {"text": "a" * LIMIT}), 413),
    ]:
        code, found = over_http(server[1], method, path, body)
        assert code == status
        assert found.startswith(b'{"error": {"message": "'), (status, found)


def test_many_clients_at_once(server):
    def ask(number):
        body = json.dumps(FULL | {"instruction": f"{number}+{number}=", "max_new_tokens": 8})
        status, found = over_http(server[1], "POST", URL, body)
        return status, json.loads(found)

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, range(24)))
    assert [status for status, _ in found] == [200] * 24
    assert all(isinstance(text, str) for _, text in found)


def test_only_this_machine_can_reach_it(server):
    inodes = set()
    for name in ("tcp", "tcp6"):
        path = Path(f"/proc/{server[0].pid}/net/{name}")
        if not path.exists():
            pytest.skip("no /proc")
        for fields in (line.split() for line in path.read_text().splitlines()[1:]):
            address, port = fields[1].split(":")
            if int(port, 16) == server[1] and fields[3] == "0A":  # LISTEN
                inodes.add(address)
    assert inodes == {"0100007F"}  # 127.0.0.1


def test_sigterm_ends_it(server):
    """The last of the process's tests."""
    process, port = server
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


# --- starting -------------------------------------------------------------------------------------------------------


def test_no_trained_run_is_one_line(tmp_path, small_gemma):
    from gemma_sft.ft_gemma import post_api

    with pytest.raises(UserError, match="train.py.*--base"):
        post_api.main(["--path_model_pretrain", str(small_gemma), "--model_save_dir", str(tmp_path)])


def test_a_port_in_use_is_a_user_error(client):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=str(port)):
            Server(client.application, "127.0.0.1", port, 4)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ResourceWarning
        )  # waitress leaves the socket it could not bind to the collector
        gc.collect()


# --- good requests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "default", "most"), [([], 128, 4096), ([300], 300, 4096), ([5000], 5000, 5000)])
def test_the_operators_length_is_the_fields_default(fake, words, default, most):
    cfg = parse(Config, None, ["--max_new_tokens", *map(str, words)] if words else [])
    client = app.create_app(app.Service("m", "tuned", fake, fields=text_generate.fields_of(cfg))).test_client()
    assert post(client, {"instruction": "有"}).status_code == 200
    assert fake.asked[0][1].max_new_tokens == default
    schema = client.get("/openapi.json").json["paths"][URL]["post"]["requestBody"]["content"]["application/json"]
    field = schema["schema"]["properties"]["max_new_tokens"]
    assert (field["default"], field["maximum"]) == (default, most)


def test_defaults_are_the_originals(client, fake):
    assert post(client, {"instruction": "你好"}).status_code == 200
    sampling = Sampling(max_new_tokens=128, do_sample=True, temperature=0.8, top_p=0.8, top_k=50, num_beams=1)
    assert fake.asked == [([Turn("user", "你好")], sampling, "tuned")]


def test_the_services_repetition_penalty_holds_here_too(fake):
    service = app.Service("m", "tuned", fake, Sampling(repetition_penalty=1.3))
    assert post(app.create_app(service).test_client(), {"instruction": "有"}).status_code == 200
    assert fake.asked[0][1].repetition_penalty == 1.3


def test_fields_reach_the_sampling(client, fake):
    body = {"max_new_tokens": 7, "temperature": 2, "do_sample": False, "num_beams": 4}
    body |= {"top_p": 1, "top_k": 0, "min_p": 1}
    assert post(client, {"text": "x", **body}).status_code == 200
    sampling = fake.asked[0][1]
    assert {name: getattr(sampling, name) for name in body} == body
    assert type(sampling.temperature) is type(sampling.top_p) is type(sampling.min_p) is float


@pytest.mark.parametrize(
    "body, question",
    [
        ({"instruction": "翻译", "text": "你好"}, "翻译\n你好"),
        ({"instruction": "翻译"}, "翻译"),
        ({"text": "你好"}, "你好"),
        ({"instruction": " ", "text": "你好"}, "你好"),
        ({"instruction": "<end_of_turn>\u2028"}, "<end_of_turn>\u2028"),
    ],
)
def test_the_question(client, fake, body, question):
    assert post(client, body).status_code == 200
    assert fake.asked[0][0] == [Turn("user", question)]


def test_base_is_passed_on(fake):
    assert post(client_of(fake, "base"), FULL).status_code == 200
    assert fake.asked[0][2] == "base"


@pytest.mark.parametrize("text", ["一条“黑色”裙子\n好看\\", "", "😀\u2028\x00\t", "</script>"])
def test_an_answer_is_readable_json(text):
    response = post(client_of(Fake(text)), FULL)
    assert response.status_code == 200 and response.mimetype == "application/json"
    raw = response.get_data().decode()
    assert json.loads(raw) == text
    assert all(char in raw for char in text if "一" <= char <= "龥")


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_content_types_of_json(client, content_type):
    assert post(client, FULL, content_type=content_type).status_code == 200


def test_health(client):
    response = client.get("/health")
    assert response.status_code == 200
    assert json.loads(response.get_data()) == {"status": "ok", "model": "model_sft"}


# --- bad requests ---------------------------------------------------------------------------------------------------

NOT_JSON = {
    "nothing": b"",
    "cut off": b'{"instruction": "a"',
    "single quotes": b"{'instruction': 'a'}",
    "a form": b"instruction=a",
    "two values": b'{"text": "a"} {"text": "b"}',
    "NaN": b'{"text": "a", "temperature": NaN}',
    "infinity": b'{"text": "a", "temperature": -Infinity}',
    "5000 digits": b'{"text": "a", "top_k": 1' + b"0" * 5000 + b"}",
    "GBK": '{"text": "你好"}'.encode("gbk"),
    "UTF-16": '{"text": "a"}'.encode("utf-16"),
    "half a character": '{"text": "你"}'.encode()[:-3] + b'"}',
    "deep lists": b'{"text": ' + b"[" * 100_000,
    "deep closed lists": b'{"text": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "deep objects": b'{"text": ' * 50_000,
    "a control character": b'{"text": "a\x01"}',
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_not_json(client, fake, body):
    response = post(client, body)
    assert response.status_code == 400
    error_of(response)
    assert fake.asked == []


ASK = {"instruction": "你好"}
WRONG = [  # body, words of the error
    ([], "object"),
    ([ASK], "object"),
    ("你好", "object"),
    (1, "object"),
    (None, "object"),
    (True, "object"),
    ({}, "empty"),
    ({"instruction": "", "text": ""}, "empty"),
    ({"instruction": " \n", "text": "　"}, "empty"),
    (ASK | {"max_new_token": 5}, "'max_new_tokens'"),
    (ASK | {"instuction": "x"}, "'instruction'"),
    (ASK | {"Temperature": 1}, "'temperature'"),
    (ASK | {"": 1}, "unknown field"),
    (ASK | {"zzzzzz": 1}, "'zzzzzz'"),
    ({"instruction": 1}, "instruction"),
    ({"instruction": None}, "instruction"),
    ({"instruction": ["你好"]}, "instruction"),
    ({"text": {"a": 1}}, "text"),
    (ASK | {"max_new_tokens": 0}, "max_new_tokens"),
    (ASK | {"max_new_tokens": -1}, "max_new_tokens"),
    (ASK | {"max_new_tokens": 10**9}, "max_new_tokens"),
    (ASK | {"max_new_tokens": 1.5}, "max_new_tokens"),
    (ASK | {"max_new_tokens": 8.0}, "max_new_tokens"),
    (ASK | {"max_new_tokens": "8"}, "max_new_tokens"),
    (ASK | {"max_new_tokens": True}, "max_new_tokens"),
    (ASK | {"max_new_tokens": None}, "max_new_tokens"),
    (ASK | {"max_new_tokens": 10**400}, "max_new_tokens"),
    (ASK | {"temperature": 0}, "temperature"),
    (ASK | {"temperature": -0.5}, "temperature"),
    (ASK | {"temperature": "hot"}, "temperature"),
    (ASK | {"temperature": False}, "temperature"),
    (ASK | {"temperature": 10**400}, "temperature"),
    (ASK | {"top_p": 0}, "top_p"),
    (ASK | {"top_p": 1.01}, "top_p"),
    (ASK | {"top_k": -1}, "top_k"),
    (ASK | {"top_k": 2.5}, "top_k"),
    (ASK | {"top_k": 10**400}, "top_k"),
    (ASK | {"num_beams": 0}, "num_beams"),
    (ASK | {"num_beams": 1000}, "num_beams"),
    (ASK | {"do_sample": 1}, "do_sample"),
    (ASK | {"do_sample": "false"}, "do_sample"),
    (ASK | {"do_sample": None}, "do_sample"),
    (ASK | {"penalty_alpha": -1}, "penalty_alpha"),
    (ASK | {"penalty_alpha": "x"}, "penalty_alpha"),
    (ASK | {"penalty_alpha": 0.6, "do_sample": False}, "penalty_alpha"),
    ({"instruction": "a\ud800b"}, "instruction"),
    ({"text": "\udc00"}, "text"),
]


@pytest.mark.parametrize("body, words", WRONG, ids=[str(body)[:60] for body, _ in WRONG])
def test_a_wrong_body_is_400_and_names_the_field(client, fake, body, words):
    response = post(client, body)
    assert response.status_code == 400
    assert words in error_of(response)
    assert fake.asked == []


def test_a_number_too_large_for_a_float(client):
    response = post(client, b'{"text": "a", "temperature": 1e999}')
    assert response.status_code == 400 and "temperature" in error_of(response)


@pytest.mark.parametrize("depth", [100, 500, 800, 850, 900, 925, 950, 975, 1000])
def test_nesting_just_below_what_python_takes(client, depth):
    for opening, closing in ((b"[", b"]"), (b'{"a": ', b"}")):
        response = post(client, b'{"text": ' + opening * depth + b"1" + closing * depth + b"}")
        assert response.status_code == 400
        error_of(response)


@pytest.mark.parametrize("penalty", [{}, {"penalty_alpha": 0}])
def test_greedy_without_contrastive_search(client, penalty):
    assert post(client, ASK | {"do_sample": False} | penalty).status_code == 200


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_wrong_content_type(client, content_type):
    response = post(client, FULL, content_type=content_type)
    assert response.status_code in (400, 415)
    assert "application/json" in error_of(response)


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", URL, 405),
        ("PUT", URL, 405),
        ("DELETE", URL, 405),
        ("POST", "/health", 405),
        ("POST", "/", 405),
        ("GET", "/static/app.js", 404),
        ("POST", "/nlg/text_generates", 404),
        ("POST", URL + "/", 404),
        ("GET", "/static/../../etc/passwd", 404),
    ],
)
def test_wrong_places(client, method, path, status):
    response = client.open(path, method=method, json=FULL)
    assert response.status_code == status
    error_of(response)


def test_a_body_too_large(client, fake):
    response = post(client, ASK | {"text": "a" * LIMIT})
    assert response.status_code == 413
    error_of(response)
    assert fake.asked == []


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_failing_model_is_500_without_details():
    response = post(client_of(Fake(RuntimeError("secret path: CUDA out of memory"))), FULL)
    assert response.status_code == 500
    error = error_of(response)
    assert "secret" not in error and "CUDA" not in error


def test_what_the_user_can_mend_is_400():
    response = post(client_of(Fake(UserError("提问太长 the question is too long"))), FULL)
    assert response.status_code == 400
    assert error_of(response) == "提问太长 the question is too long"


def test_it_answers_after_a_failure(fake):
    client = client_of(fake)
    good, fake.text = fake.text, ValueError("bad")
    assert post(client, FULL).status_code == 500
    fake.text = good
    assert json.loads(post(client, FULL).get_data()) == good


# --- the real model, in this process --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(small_gemma):
    from gemma_sft.ft_gemma import predict
    from gemma_sft.ft_gemma.config import Config

    cfg = Config(path_model_pretrain=str(small_gemma), model_save_dir="/nowhere", given=frozenset())
    batcher = Batcher(predict.load_answer(cfg, base=True), {"base": None})
    yield batcher
    batcher.close()


def test_concurrent_greedy_requests_get_their_own_answers(real):
    """Each answer is the one its question gets from the model alone."""
    greedy = {"do_sample": False, "max_new_tokens": 8}
    questions = [f"{number}+{number}=" for number in range(12)]

    def ask(question):
        response = post(client_of(real, "base"), {"instruction": question, **greedy})
        return response.status_code, json.loads(response.get_data())

    turns = [[Turn("user", question)] for question in questions]
    alone = [(200, real.answer([one], Sampling(max_new_tokens=8))[0].text) for one in turns]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, questions)) == alone


def test_a_long_text_is_400_with_the_numbers(real):
    """As /v1 does: nothing is cut, and an answer asked for by length has its room or is refused."""
    client, frame = client_of(real, "base"), len(real.encoder.whole_ids([Turn("user", "有")])) - 1
    told = "提示太长 the prompt is too long: {}, 上限 the limit for both is 1024"
    for body, param, counts in [
        ({"text": "有" * 1100}, None, f"{1100 + frame} tokens"),
        ({"text": "有" * 1000, "max_new_tokens": 60}, "max_new_tokens", f"{1000 + frame} tokens + max_new_tokens 60"),
    ]:
        response = post(client, body)
        assert response.status_code == 400 and error_of(response) == told.format(counts)
        assert (response.json["error"]["param"], response.json["error"]["code"]) == (param, "context_length_exceeded")
    for body in ({"text": "有" * 1000}, {"text": "有" * 1000, "max_new_tokens": 2}):  # 128 by default: as many as fit
        assert post(client, body).status_code == 200


def test_nothing_of_a_text_is_cut(real):
    """A text beyond --max_length_q is what it is."""
    greedy, text = {"do_sample": False, "max_new_tokens": 8}, "有" + "问答" * 300 + "1"
    assert len(real.encoder.whole_ids([Turn("user", text)])) > real.answer.max_length_q
    expected = real.submit("base", [Ask(real.encoder.whole_ids([Turn("user", text)]), Sampling(max_new_tokens=8))])
    found = post(client_of(real, "base"), {"text": text, **greedy})
    assert json.loads(found.get_data()) == "".join(part.text for parts in expected.parts() for part in parts)


def test_beams_over_http(real):
    response = post(client_of(real, "base"), {"text": "有", "do_sample": False, "num_beams": 3, "max_new_tokens": 6})
    expected = real.answer([[Turn("user", "有")]], Sampling(max_new_tokens=6, num_beams=3))[0].text
    assert response.status_code == 200 and json.loads(response.get_data()) == expected
