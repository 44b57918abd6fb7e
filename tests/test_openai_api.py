"""OpenAI's API, used by OpenAI's client over real HTTP, on a small model of each family."""

import contextlib
import http.server
import importlib
import json
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from common.conversation.turns import Turn
from common.engine.batcher import Batcher
from common.engine.kv_batch import KVBatch
from common.inference.answerer import Sampling
from common.serving import openai_requests
from common.serving.app import Service, create_app
from common.serving.server import Server

FAMILIES = {
    "gemma": "gemma_sft.ft_gemma",
    "qwen": "qwen2_sft.ft_qwen2",
    "chatglm": "chatglm_sft.ft_chatglm",
    "glm4": "chatglm_sft.ft_glm4",
}
ASK = [{"role": "user", "content": "有问答吗"}]
LIVELY = {"temperature": 2.0, "max_tokens": 24}  # a random model says something then


class Client:
    """An OpenAI client of one service, and the model it serves."""

    def __init__(self, family, folder):
        predict = importlib.import_module(FAMILIES[family] + ".predict")
        config = importlib.import_module(FAMILIES[family] + ".config").Config
        cfg = config(path_model_pretrain=str(folder), model_save_dir="/nowhere")
        self.answer = predict.load_answer(cfg, base=True)
        self.batcher = Batcher(self.answer, {"base": None}, queue=8)
        self.service = Service("m", "base", self.batcher)
        self.server = Server(create_app(self.service), "127.0.0.1", 0, 24)
        self.url = self.server.address
        self.api = openai.OpenAI(base_url=self.url + "/v1", api_key="-", max_retries=0, timeout=60)

    def chat(self, messages=ASK, **fields):
        return self.api.chat.completions.create(model="base", messages=messages, **fields)

    def complete(self, prompt, **fields):
        return self.api.completions.create(model="base", prompt=prompt, **fields)

    def close(self):
        self.api.close()
        self.server.close()
        self.batcher.close()


@pytest.fixture(scope="module", params=FAMILIES)
def client(request):
    client = Client(request.param, request.getfixturevalue(f"small_{request.param}"))
    yield client
    client.close()


def lively(client, **fields):
    """A seed whose answer has several characters, and the answer."""
    for seed in range(50):
        choice = client.chat(seed=seed, **LIVELY | fields).choices[0]
        if len(choice.message.content) > 10:
            return seed, choice.message.content
    raise AssertionError("no seed makes it talk")


def test_chat(client):
    found = client.chat(temperature=0, max_tokens=20)
    expected = client.answer([[Turn("user", "有问答吗")]], Sampling(max_new_tokens=20))[0]
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.stop)
    assert choice.message.role == "assistant" and found.object == "chat.completion" and found.model == "base"
    prompt = len(client.batcher.encoder.whole_ids([Turn("user", "有问答吗")]))
    counts = found.usage
    assert (counts.prompt_tokens, counts.completion_tokens) == (prompt, expected.tokens)
    assert counts.total_tokens == prompt + expected.tokens


def test_a_conversation(client):
    messages = [
        {"role": "system", "content": "问"},
        {"role": "user", "content": [{"type": "text", "text": "有"}, {"type": "text", "text": "他"}]},
        {"role": "assistant", "content": "是"},
        *({"role": "user", "content": part} for part in ("不", "了")),
    ]
    turns = [Turn("system", "问"), Turn("user", "有\n他"), Turn("assistant", "是"), Turn("user", "不\n\n了")]
    expected = client.answer([turns], Sampling(max_new_tokens=9))[0].text
    assert client.chat(messages, temperature=0, max_completion_tokens=9).choices[0].message.content == expected


def test_streaming(client):
    seed, text = lively(client)
    chunks = list(client.chat(seed=seed, stream=True, stream_options={"include_usage": True}, **LIVELY))
    *told, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in told) == text
    assert [chunk.choices[0].delta.role for chunk in told] == ["assistant"] + [None] * (len(told) - 1)
    assert [chunk.choices[0].finish_reason for chunk in told[:-1]] == [None] * (len(told) - 1)
    assert told[-1].choices[0].finish_reason in ("stop", "length")
    assert last.choices == [] and last.usage == client.chat(seed=seed, **LIVELY).usage
    assert len(told) > 3 and len({chunk.id for chunk in chunks}) == 1


def test_the_stream_itself(client):
    """Server-sent events, one JSON object each, the last one [DONE]."""
    body = json.dumps({"messages": ASK, "max_tokens": 3, "stream": True}).encode()
    request = urllib.request.Request(
        client.url + "/v1/chat/completions", body, {"Content-Type": "application/json", "X-Request-ID": "me-1"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert response.headers["X-Request-ID"] == "me-1"
        *events, done, rest = response.read().decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert {json.loads(event.removeprefix("data: "))["id"] for event in events} == {"chatcmpl-me-1"}


def test_stop_strings(client):
    seed, text = lively(client)
    stop = text[5:7]
    expected = text[: text.index(stop)]
    whole = client.chat(seed=seed, stop=[stop, "绝不"], **LIVELY).choices[0]
    assert (whole.message.content, whole.finish_reason) == (expected, "stop")
    parts = [chunk.choices[0] for chunk in client.chat(seed=seed, stop=stop, stream=True, **LIVELY)]
    assert "".join(part.delta.content or "" for part in parts) == expected and parts[-1].finish_reason == "stop"


def test_min_p(client):
    """1 leaves the most probable piece alone, in both of OpenAI's paths and however hot."""
    hot = {"temperature": 9.0, "max_tokens": 12, "seed": 3}
    one, none = ({"extra_body": {"min_p": share, "top_k": 0}} for share in (1.0, 0.0))
    for asked in (client.chat, lambda **fields: client.complete("有问", **fields)):
        greedy = asked(temperature=0, max_tokens=12).choices
        assert asked(**hot, **one).choices == greedy != asked(**hot, **none).choices


def test_seeds_and_n(client):
    first, again = (client.chat(seed=5, n=3, **LIVELY) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices] and len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    prompt = len(client.batcher.encoder.whole_ids([Turn("user", "有问答吗")]))
    assert first.usage.prompt_tokens == prompt
    streamed = ["", "", ""]
    for chunk in client.chat(seed=5, n=3, stream=True, **LIVELY):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    assert len({choice.message.content for choice in client.chat(seed=-1, n=3, **LIVELY).choices}) == 3


def test_logprobs(client):
    """As the model gives them: those of a forward pass over prompt and answer."""
    import torch

    ids = client.batcher.encoder.whole_ids([Turn("user", "有问答吗")])
    found = client.chat(temperature=0, max_tokens=6, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert 0 < len(found) <= 6
    with torch.inference_mode():
        scores = client.answer.net(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
    best = scores.topk(2)
    assert [entry.logprob for entry in found[0].top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert found[0].logprob == pytest.approx(best.values[0].item(), abs=1e-4)
    assert found[0].token == client.batcher.encoder.token(best.indices[0].item())[0]
    streamed = client.chat(temperature=0, max_tokens=6, logprobs=True, top_logprobs=2, stream=True)
    entries = [entry for chunk in streamed for entry in (chunk.choices[0].logprobs or found and None or []).content]
    assert entries == found


def test_completions(client):
    """A prompt as token ids, as text, and several at once."""
    ids = client.batcher.encoder.whole_ids([Turn("user", "有问答吗")])
    chatted = client.answer([[Turn("user", "有问答吗")]], Sampling(max_new_tokens=12))[0].text
    one = client.complete(ids, temperature=0, max_tokens=12)
    assert one.choices[0].text.strip() == chatted or client.answer.prompt.clean(one.choices[0].text) == chatted
    assert one.usage.prompt_tokens == len(ids) and one.object == "text_completion"
    texts = client.complete(["有", "问答"], temperature=0, max_tokens=5)
    single = [client.complete(text, temperature=0, max_tokens=5).choices[0].text for text in ("有", "问答")]
    assert [choice.text for choice in texts.choices] == single
    streamed = client.complete(ids, temperature=0, max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == one.choices[0].text


def test_completion_logprobs(client):
    found = client.complete("有问", temperature=1.0, seed=1, max_tokens=8, logprobs=2).choices[0]
    logprobs = found.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs)
    assert all(value <= 0 for value in logprobs.token_logprobs)
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:n])) for n in range(len(logprobs.tokens))]


def test_errors(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat([{"role": "root", "content": "x"}])
    assert caught.value.param == "messages[0].role" and caught.value.code == "invalid_message"
    with pytest.raises(openai.NotFoundError) as caught:
        client.api.chat.completions.create(model="gpt", messages=ASK)
    assert caught.value.code == "model_not_found" and "base" in str(caught.value)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat([{"role": "user", "content": "有" * 5000}])
    assert caught.value.code == "context_length_exceeded" and str(client.batcher.context) in str(caught.value)
    with pytest.raises(openai.BadRequestError, match="max_completion_tokens 100000") as caught:
        client.chat(max_completion_tokens=100_000)
    assert caught.value.param == "max_completion_tokens"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat(max_tokens=client.batcher.context)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat(tools=[{"type": "function", "function": {"name": "f"}}])
    assert caught.value.param == "tools"


def test_models(client):
    assert [model.id for model in client.api.models.list()] == ["base"]
    assert client.api.models.retrieve("base").id == "base"
    with pytest.raises(openai.NotFoundError):
        client.api.models.retrieve("gpt-4")


def test_sixteen_clients(client):
    """Each gets what it gets alone."""

    def ask(number):
        message = [{"role": "user", "content": f"{'有他' * number}{number}+{number}="}]
        return client.chat(message, temperature=0, max_tokens=8 + number).choices[0].message.content

    alone = [ask(number) for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == alone


def test_control_tokens_stay_text(client):
    """Whatever a user types, the prompt has no more control tokens than the template puts there."""
    special = set(client.batcher.tokenizer.all_special_ids) | set(client.batcher.stop_ids)
    typed = "".join(client.batcher.tokenizer.all_special_tokens) + "<|im_start|><end_of_turn><sop>[gMASK]"

    def controls(messages):
        body = {"messages": messages}
        wanted = openai_requests.read_chat(body, client.batcher, Sampling())
        return [id_ for id_ in wanted.asks[0].ids if id_ in special]

    def conversation(text):
        return [
            {"role": "system", "content": "a" + text, "name": "b" + text},
            {"role": "user", "content": "a" + text},
            {"role": "assistant", "content": "a" + text},
            {"role": "user", "content": "a" + text},
        ]

    assert controls(conversation(typed)) == controls(conversation("")) != []
    text = openai_requests.read_completion({"prompt": "a" + typed}, client.batcher, Sampling()).asks[0].ids
    plain = openai_requests.read_completion({"prompt": "a"}, client.batcher, Sampling()).asks[0].ids
    assert [id_ for id_ in text if id_ in special] == [id_ for id_ in plain if id_ in special]


# --- the service around them, on Gemma alone -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma(small_gemma):
    client = Client("gemma", small_gemma)
    yield client
    client.close()


@contextlib.contextmanager
def held(client, monkeypatch):
    """The model stands still until the Event is set."""
    free, forward = threading.Event(), client.batcher.net.forward

    def wait(*args, **kwargs):
        free.wait(30)
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(client.batcher.net, "forward", wait)
        try:
            yield free
        finally:
            free.set()
            until(lambda: not client.batcher.active_count)


def until(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("waited for nothing")


def test_a_full_queue_is_429(gemma, monkeypatch):
    """24 answers are taken, in slots or the queue; the next is told to come again; then all 24 are answered."""
    with held(gemma, monkeypatch) as free, ThreadPoolExecutor(24) as pool:
        answers = [pool.submit(gemma.chat, temperature=0, max_tokens=2) for _ in range(24)]
        until(lambda: gemma.batcher.active_count + len(gemma.batcher.waiting) == 24)
        with pytest.raises(openai.RateLimitError) as caught:
            gemma.chat(max_tokens=2)
        assert caught.value.code == "queue_full" and caught.value.response.headers["Retry-After"] == "1"
        with urllib.request.urlopen(gemma.url + "/metrics", timeout=60) as response:
            text = response.read().decode()
        waiting, active = (float(text.split(f"\nrequests_{name} ")[1].split()[0]) for name in ("waiting", "active"))
        assert waiting + active == 24 and active >= 1
        free.set()
        assert len({answer.result().choices[0].message.content for answer in answers}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_time_limit(gemma, monkeypatch, stream):
    """Before anything is sent it is a status."""
    monkeypatch.setattr(gemma.service, "seconds", 0.05)
    with held(gemma, monkeypatch), pytest.raises(openai.InternalServerError) as caught:
        list(gemma.chat(max_tokens=2, stream=stream))
    assert caught.value.status_code == 503 and caught.value.code == "timeout"


def test_more_answers_than_there_are_places_are_not_to_be_tried_again(gemma, monkeypatch):
    monkeypatch.setattr(gemma.batcher, "slots", 1)
    monkeypatch.setattr(gemma.batcher, "queue", 2)
    with pytest.raises(openai.BadRequestError, match="at most 3") as caught:
        gemma.chat(max_tokens=2, n=4)
    assert caught.value.param == "n"
    assert len(gemma.chat(max_tokens=2, n=3).choices) == 3


def test_a_failure_in_a_stream_is_its_last_event(gemma, monkeypatch):
    """Without [DONE]; the client raises."""
    step, calls = KVBatch.step, []

    def fail(batch, *args):
        calls.extend(batch.rows)  # none where a step is being recorded
        if len(calls) == 3:
            raise RuntimeError("secret")
        return step(batch, *args)

    monkeypatch.setattr(KVBatch, "step", fail)  # the model's own, or replayed
    with pytest.raises(openai.APIError) as caught:
        list(gemma.chat(max_tokens=20, temperature=0, stream=True, presence_penalty=2))
    assert "secret" not in str(caught.value) and caught.value.code == "model_failed"
    with pytest.raises(openai.InternalServerError) as caught:
        calls.clear()
        gemma.chat(max_tokens=20, temperature=0, presence_penalty=2)
    assert caught.value.status_code == 500 and caught.value.code == "model_failed"
    assert gemma.batcher.alive


def test_keys(gemma, monkeypatch):
    monkeypatch.setattr(gemma.service, "api_key", ("密钥-1",))
    with pytest.raises(openai.AuthenticationError) as caught:
        gemma.chat(max_tokens=2)
    assert caught.value.code == "invalid_api_key"
    flask = create_app(gemma.service).test_client()
    good = {"Authorization": "Bearer 密钥-1".encode().decode("latin-1")}
    assert flask.get("/v1/models", headers=good).status_code == 200
    assert flask.get("/v1/models", headers={"Authorization": "Bearer x"}).headers["WWW-Authenticate"] == "Bearer"
    for path, status in {
        "/": 200,
        "/docs": 200,
        "/openapi.json": 200,
        "/health": 200,
        "/metrics": 401,
        "/x": 401,
    }.items():
        assert flask.get(path).status_code == status


def test_each_of_several_keys_has_prefixes_of_its_own(gemma, monkeypatch):
    """cached_tokens of one question asked twice by each key, whole and streamed; /metrics and the log add them up."""
    monkeypatch.setattr(gemma.service, "api_key", ("one", "two"))
    flask, cached = create_app(gemma.service).test_client(), []
    body = {"messages": [{"role": "user", "content": "有问答吗" * 20}], "max_tokens": 2, "temperature": 0}
    for key in ("one", "two", "one", "two"):
        headers = {"Authorization": f"Bearer {key}"}
        usage = flask.post("/v1/chat/completions", buffered=True, json=body, headers=headers).json["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached[:2] == [0, 0] and cached[2] == cached[3] > 60
    stream = body | {"stream": True, "stream_options": {"include_usage": True}, "n": 2}
    last = flask.post("/v1/chat/completions", buffered=True, json=stream, headers=headers).get_data(as_text=True)
    assert f'"prompt_tokens_details": {{"cached_tokens": {cached[2]}}}' in last.split("data: ")[-2]
    metrics = flask.get("/metrics", headers=headers).get_data(as_text=True)
    assert f'cached_tokens_total{{model="base"}} {4 * cached[2]:.1f}' in metrics
    assert f"kept_tokens {gemma.batcher.prefixes.tokens:.1f}" in metrics
    assert flask.get("/v1/models", headers={"Authorization": "Bearer one two"}).status_code == 401


def test_an_option_of_a_stream_that_is_null_is_left_out(gemma):
    body = {"messages": [{"role": "user", "content": "有"}], "max_tokens": 2, "stream": True}
    body["stream_options"] = {"include_usage": None}
    found = create_app(gemma.service).test_client().post("/v1/chat/completions", buffered=True, json=body)
    assert found.status_code == 200 and "prompt_tokens" not in found.get_data(as_text=True)


def test_other_origins_are_let_in_only_where_asked(gemma, monkeypatch):
    flask = create_app(gemma.service).test_client()
    assert "Access-Control-Allow-Origin" not in flask.get("/health", headers={"Origin": "http://a"}).headers
    monkeypatch.setattr(gemma.service, "cors", "http://a")
    monkeypatch.setattr(gemma.service, "api_key", ("k",))
    preflight = flask.options("/v1/chat/completions", headers={"Origin": "http://a"})
    assert preflight.status_code == 200 and preflight.headers["Access-Control-Allow-Origin"] == "http://a"
    assert "Authorization" in preflight.headers["Access-Control-Allow-Headers"]
    asked = {"Origin": "http://a", "Access-Control-Request-Headers": "authorization,x-stainless-lang"}
    preflight = flask.options("/v1/chat/completions", headers=asked)
    assert preflight.headers["Access-Control-Allow-Headers"] == "authorization,x-stainless-lang"


def test_states(gemma, monkeypatch):
    """Loading, draining and dead are 503, by name."""
    flask = create_app(gemma.service).test_client()
    for state, changes in {"loading": {"batcher": None}, "draining": {"draining": True}}.items():
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(gemma.service, name, value)
            health, chat = flask.get("/health"), flask.post("/v1/chat/completions", json={"messages": ASK})
            assert health.status_code == chat.status_code == 503
            assert health.json["status"] == chat.json["error"]["code"] == state and chat.headers["Retry-After"]
    with monkeypatch.context() as patch:
        patch.setattr(gemma.batcher, "broken", True)
        assert flask.get("/health").json["status"] == "dead"
    assert flask.get("/health").json == {"status": "ok", "model": "m"}


def test_log_lines_hold_no_text(gemma, monkeypatch, caplog):
    flask = create_app(gemma.service).test_client()
    with caplog.at_level("INFO", "service"):
        flask.post(
            "/v1/chat/completions",
            buffered=True,
            json={"messages": ASK, "max_tokens": 2},
            headers={"X-Request-ID": "id-1"},
        )
        flask.post("/v1/chat/completions", buffered=True, json={"messages": []}, headers={"X-Request-ID": "bad\x7fid"})
    first, second = (json.loads(record.message) for record in caplog.records)
    assert first["id"] == "id-1" and first["status"] == 200 and first["model"] == "base"
    assert {"prompt_tokens", "completion_tokens", "queued_ms", "first_token_ms", "ms", "stop"} <= first.keys()
    assert second["status"] == 400 and len(second["id"]) == 32
    assert "有问答吗" not in str(first) and "texts" not in first
    caplog.clear()
    monkeypatch.setattr(gemma.service, "log_text", True)
    with caplog.at_level("INFO", "service"):
        flask.post("/v1/chat/completions", buffered=True, json={"messages": ASK, "max_tokens": 2})
    assert "有问答吗" in json.loads(caplog.records[0].message)["prompt"]


def test_metrics(gemma):
    def value(line):
        text = flask.get("/metrics").get_data(as_text=True)
        return sum(float(found.split()[-1]) for found in text.splitlines() if found.startswith(line))

    flask = create_app(gemma.service).test_client()
    body = {"messages": ASK, "max_tokens": 3, "temperature": 0}
    counts = flask.post("/v1/chat/completions", buffered=True, json=body).json["usage"]
    flask.post("/v1/chat/completions", buffered=True, json={})
    assert value('requests_total{path="/v1/chat/completions",status="200"}') == 1
    assert value('requests_total{path="/v1/chat/completions",status="400"}') == 1
    assert value('prompt_tokens_total{model="base"}') == counts["prompt_tokens"]
    assert value('completion_tokens_total{model="base"}') == counts["completion_tokens"]
    assert value("time_to_first_token_seconds_count") == value("queue_seconds_count") == 1


def test_the_openapi_document_tells_the_truth(gemma):
    """Every path is served, every field is taken, and nothing else."""
    flask = create_app(gemma.service).test_client()
    paths = flask.get("/openapi.json").json["paths"]
    served = {rule.rule for rule in flask.application.url_map.iter_rules()}
    assert paths.keys() <= served and "openapi.json" in flask.get("/docs").get_data(as_text=True)
    for path in [path for path in paths if "post" in paths[path]]:
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for name in [*schema["properties"], "no_such_field"]:
            value = 1 if name == "no_such_field" else None if "v1" in path else {}
            error = flask.post(path, json={name: value}).json["error"]
            assert (error["code"] == "unknown_field") == (name == "no_such_field"), (path, name, error)


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes OTLP over HTTP."""

    got = []

    def do_POST(self):
        self.got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


def test_traces(gemma, monkeypatch):
    """One span a request, below the client's own; no text of the user."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="opentelemetry is not installed")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        app = create_app(gemma.service)
        parent = {"traceparent": "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"}
        body = {"messages": ASK, "max_tokens": 2}
        app.test_client().post("/v1/chat/completions", json=body, headers=parent, buffered=True)
        app.test_client().get("/health", buffered=True)
        app.wsgi_app.tracer.provider.shutdown()
        server.shutdown()
    ((path, raw),) = Collector.got
    (span,) = ExportTraceServiceRequest.FromString(raw).resource_spans[0].scope_spans[0].spans
    values = {one.key: one.value.string_value or one.value.int_value for one in span.attributes}
    assert path == "/v1/traces" and span.name == "POST /v1/chat/completions"
    assert (span.trace_id, span.parent_span_id) == (b"\xab" * 16, b"\xcd" * 8)
    assert values["http.response.status_code"] == 200 and values["gen_ai.request.model"] == "base"
    assert values["gen_ai.usage.input_tokens"] > 2 and "有问答吗".encode() not in raw


def test_no_endpoint_no_traces(gemma, monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert create_app(gemma.service).wsgi_app.tracer is None
