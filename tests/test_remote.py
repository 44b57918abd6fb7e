"""predict.py and evaluation.py with --base_url: the server's answers are those of the model itself."""

import http.server
import json
import threading

import pytest

from common.conversation.turns import Turn
from common.engine.batcher import Batcher
from common.errors import UserError
from common.inference import remote
from common.inference.answerer import Answer, Sampling
from common.serving import app
from common.serving.server import Server
from gemma_sft import prompt
from gemma_sft.ft_gemma import evaluation, predict
from gemma_sft.ft_gemma.config import Config

QUESTIONS = [[Turn("user", text)] for text in ("有", "问答<end_of_turn>吗", "1+1=")]


@pytest.fixture(scope="module")
def cfg(small_gemma):
    return Config(path_model_pretrain=str(small_gemma), model_save_dir="/nowhere", given=frozenset())


@pytest.fixture(scope="module")
def answer(cfg):
    return predict.load_answer(cfg, base=True)


@pytest.fixture(scope="module")
def url(answer):
    batcher = Batcher(answer, {"base": None})
    server = Server(app.create_app(app.Service("m", "base", batcher, api_key=("k",))), "127.0.0.1", 0, 8)
    yield server.address + "/v1"
    server.close()
    batcher.close()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")


def test_the_same_answers(answer, cfg, url):
    there = predict.load_answer(cfg, base_url=url)
    sampling = Sampling(max_new_tokens=20, repetition_penalty=1.3)
    assert there(QUESTIONS, sampling, base=True) == [answer([one], sampling)[0] for one in QUESTIONS]
    for question in QUESTIONS:
        assert "".join(there.stream(question, sampling)) == answer([question], sampling)[0].text


def test_a_stream_that_is_left(cfg, url):
    stream = remote.load(cfg, prompt, url).stream(QUESTIONS[0], Sampling(max_new_tokens=900, do_sample=True))
    next(stream)
    stream.close()


def test_predict_and_evaluation(cfg, url, small_gemma, tmp_path, capsys, answer):
    flags = ["--base_url", url, "--path_model_pretrain", str(small_gemma), "--model_save_dir", str(tmp_path)]
    predict.main([*flags, "--query", "有", "--do_sample", "false", "--max_new_tokens", "9"])
    assert capsys.readouterr().out.strip() == answer([QUESTIONS[0]], Sampling(max_new_tokens=9))[0].text.strip()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"query": f"{n}+1=", "response": str(n + 1)}) + "\n" for n in range(5)))
    evaluation.main([*flags, "--data_path", str(rows), "--max_new_tokens", "9"])
    found = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    alone = [answer([[Turn("user", f"{n}+1=")]], Sampling(max_new_tokens=9))[0].text for n in range(5)]
    assert [row["answer"] for row in sorted(found, key=lambda row: row["row"])] == alone


def test_a_file_of_questions(cfg, url, small_gemma, tmp_path, answer):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"query": f"{n}+1="}) + "\n" for n in range(5)))
    flags = ["--base_url", url, "--path_model_pretrain", str(small_gemma), "--model_save_dir", str(tmp_path)]
    predict.main([*flags, "--data_path", str(rows), "--output", str(tmp_path / "a.jsonl"), "--max_new_tokens", "9"])
    found = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    alone = [answer([[Turn("user", f"{n}+1=")]], Sampling(max_new_tokens=9))[0] for n in range(5)]
    assert [(one["answer"], one["finish_reason"]) for one in found] == [(one.text, one.stop) for one in alone]


def test_what_a_server_cannot_do(cfg, url, monkeypatch):
    there = remote.load(cfg, prompt, url)
    with pytest.raises(UserError, match="num_beams"):
        there(QUESTIONS, Sampling(num_beams=2))
    with pytest.raises(UserError, match="400.*context"):
        there(QUESTIONS, Sampling(max_new_tokens=5000))
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(remote.UnreachableError, match="401"):
        remote.load(cfg, prompt, url)
    with pytest.raises(remote.UnreachableError, match="http://127.0.0.1:9/v1.*nobody answers"):
        remote.load(cfg, prompt, "http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="nobody answers"):
        remote.load(cfg, prompt, "nonsense")


class TextOnly(http.server.BaseHTTPRequestHandler):
    """Takes prompts as text alone, serves no base, and is busy at first."""

    asked, busy = [], 1

    def do_GET(self):
        self.reply(200, {"data": [{"id": "theirs"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        if not isinstance(body["prompt"], str):
            return self.reply(400, {"error": {"message": "prompt must be a string"}})
        if TextOnly.busy:
            TextOnly.busy -= 1
            return self.reply(503, {"error": {"message": "busy"}})
        self.reply(200, {"choices": [{"text": " 好 ", "finish_reason": "length"}]})

    def reply(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def test_a_server_that_takes_text_alone(cfg, capsys):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), TextOnly) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there = remote.load(cfg, prompt, f"http://127.0.0.1:{server.server_port}/v1/")
        found = there([QUESTIONS[0]], Sampling(max_new_tokens=3, do_sample=True, temperature=0.5, top_k=7, min_p=0.1))
        there([QUESTIONS[2]], Sampling(max_new_tokens=3))
        with pytest.raises(UserError, match="no model called base: theirs"):
            there([QUESTIONS[0]], Sampling(), base=True)
        server.shutdown()
    assert found == [Answer("好", "length", 0, 0)] and "text" in capsys.readouterr().out
    ids, busy, taken, again = TextOnly.asked
    assert isinstance(ids["prompt"], list) and busy == taken
    assert taken["prompt"] == "<start_of_turn>user\n有<end_of_turn>\n<start_of_turn>model\n"  # the bos is the server's
    assert {name: taken[name] for name in ("model", "temperature", "top_p", "top_k", "min_p", "max_tokens")} == {
        "model": "theirs",
        "temperature": 0.5,
        "top_p": 1.0,
        "top_k": 7,
        "min_p": 0.1,
        "max_tokens": 3,
    }
    assert again["temperature"] == 0 and again["repetition_penalty"] == 1 and "min_p" not in again


def test_what_a_server_would_do_otherwise_is_told_it(cfg, answer):
    """The sampling is the user's, also where it is the plainest and the server has another one of its own."""
    batcher = Batcher(answer, {"base": None})
    service = app.Service("m", "base", batcher, Sampling(do_sample=True, top_k=1, min_p=1, repetition_penalty=1.9))
    server = Server(app.create_app(service), "127.0.0.1", 0, 8)
    try:
        there, plain = remote.load(cfg, prompt, server.address + "/v1"), Sampling(max_new_tokens=20)
        assert there(QUESTIONS, plain) == [answer([one], plain)[0] for one in QUESTIONS]
        drawn = {there([QUESTIONS[0]], Sampling(20, do_sample=True, temperature=3.0))[0].text for _ in range(4)}
        assert len(drawn) > 1
    finally:
        server.close()
        batcher.close()


class Breaking(TextOnly):
    """Says once by a date when to come again; then its answers, and its streams, have no end."""

    busy = 1

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if Breaking.busy:
            Breaking.busy -= 1
            self.send_response(503)
            self.send_header("Retry-After", "Sun, 29 Nov 2026 13:20:00 GMT")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        data = b'data: {"choices": [{"text": "12"}]}\n\n'
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))


def test_an_answer_that_breaks_off_is_none(cfg):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Breaking) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there, parts = remote.load(cfg, prompt, f"http://127.0.0.1:{server.server_port}/v1"), []
        with pytest.raises(remote.UnreachableError, match="broke off"):
            parts.extend(there.stream(QUESTIONS[0], Sampling()))
        stream = there.stream(QUESTIONS[0], Sampling())
        assert next(stream) == "12"
        stream.close()
        with pytest.raises(remote.UnreachableError, match="broke off"):
            there([QUESTIONS[0]], Sampling())
        server.shutdown()
    assert Breaking.busy == 0


class LlamaCpp(TextOnly):
    asked = []

    def do_GET(self):
        self.reply(200, {"data": [{"id": "m.gguf", "owned_by": "llamacpp"}]})


def test_llama_cpp_has_names_of_its_own(cfg):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), LlamaCpp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there = remote.load(cfg, prompt, f"http://127.0.0.1:{server.server_port}/v1")
        there(QUESTIONS[:1], Sampling(repetition_penalty=1.3))
        server.shutdown()
    sent = LlamaCpp.asked[-1]
    assert sent["repeat_penalty"] == 1.3 and sent["repeat_last_n"] > 1000 and "repetition_penalty" not in sent
