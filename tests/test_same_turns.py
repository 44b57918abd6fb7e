"""A conversation means the same in a file and over HTTP; bodies as real clients send them are answered, or refused."""

import gzip
import json

import pytest

from common.data.formats import read_row
from common.engine.batcher import Batcher
from common.serving.app import Service, create_app
from common.serving.openai_messages import read_messages

CHAT = "/v1/chat/completions"
U, A, S = (lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant", "system"))
CONVERSATIONS = {
    "in order": [U("一"), A("二"), U("三")],
    "with a system text": [S("规则"), U("一"), A("二"), U("三")],
    "neighbours": [U("一"), U("二"), A("三"), A("四"), U("五")],
    "a greeting": [A("您好"), U("一")],
    "a greeting after a system text": [S("规则"), A("您好"), U("一"), A("二"), U("三")],
    "an empty answer": [U("一"), A(None), U("二")],
    "an empty system text": [S(""), U("一")],
    "a system text in between": [U("一"), A("二"), S("用英文"), U("三")],
    "two system texts": [S("规则"), S("再一条"), U("一")],
    "a developer": [{"role": "developer", "content": "规则"}, U("一")],
    "parts": [U([{"type": "text", "text": "一"}, {"type": "text", "text": "二"}])],
    "an empty question": [U("一"), A("二"), U(""), U("三")],
    "an empty question first": [U(" "), A("您好"), U("一")],
    "a question that is null": [U("一"), A("二"), U(None), U("三")],
    "a system text that is null": [S(None), U("一")],
    "a name": [U("一") | {"name": "王芳"}],
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_conversation_gives_the_same_turns(messages):
    """A file has the answer too, which is what HTTP asks for."""
    asked = read_messages(messages)
    (trained,) = read_row({"messages": [*messages, A("答")]}).conversations
    assert [turn[:2] for turn in trained[:-1]] == [turn[:2] for turn in asked]
    assert trained[-1][:2] == ("assistant", "答") and asked[-1].role == "user"


@pytest.fixture(scope="module")
def client(small_qwen):
    from qwen2_sft.ft_qwen2 import predict
    from qwen2_sft.ft_qwen2.config import Config

    answer = predict.load_answer(Config(path_model_pretrain=str(small_qwen), model_save_dir="/nowhere"), base=True)
    batcher = Batcher(answer, {"base": None})
    yield create_app(Service("m", "base", batcher)).test_client()
    batcher.close()


ANSWERED = {
    "echoed": {
        "messages": [U("你好"), A("您好") | {"id": "m1", "reasoning_content": "想", "refusal": None}, U("再见")]
    },
    "null unknown here": {"messages": [U("你好")], "prediction": None, "audio": None},
    "thinking off": {"messages": [U("你好")], "chat_template_kwargs": {"enable_thinking": False}},
    "thinking off, as a field": {"messages": [U("你好")], "enable_thinking": False},
    **{name: {"messages": messages} for name, messages in CONVERSATIONS.items()},
    "tools not to be used": {"messages": [U("你好")], "tools": [{"type": "function"}], "tool_choice": "none"},
    "functions not to be used": {"messages": [U("你好")], "functions": [{"name": "f"}], "function_call": "none"},
    "a thought sent back": {"messages": [U("你好"), A("您好") | {"reasoning": "想"}, U("再见")]},
}
REFUSED = {
    "thinking on": ({"messages": [U("你好")], "enable_thinking": True}, "enable_thinking"),
    "tools": ({"messages": [U("你好")], "tools": [{"type": "function"}]}, "tools"),
    "JSON mode": ({"messages": [U("你好")], "response_format": {"type": "json_object"}}, "response_format"),
    "an empty question last": ({"messages": [U("你好"), A("您好"), U("")]}, "messages[2].content"),
    "no near field": ({"messages": [U("你好")], "system": "简短"}, "system"),
    "a thought of the user": ({"messages": [U("你好") | {"extra": "想"}]}, "messages[0].extra"),
}


@pytest.mark.parametrize("body", ANSWERED.values(), ids=ANSWERED)
def test_what_clients_send_is_answered(client, body):
    assert client.post(CHAT, json=body | {"max_tokens": 2}).status_code == 200


@pytest.mark.parametrize(("body", "param"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_refused_by_name(client, body, param):
    response = client.post(CHAT, json=body)
    assert (response.status_code, response.json["error"]["param"]) == (400, param)
    assert "leave it out" in response.json["error"]["message"] or "messages" in param
    assert "did you mean" not in response.json["error"]["message"]


@pytest.mark.parametrize("name", ["max_token", "Max_Tokens", "max-tokens", "temprature"])
def test_a_mistyped_field_is_told_its_name(client, name):
    found = client.post(CHAT, json={"messages": [U("你好")], name: 1}).json["error"]["message"]
    assert f"did you mean '{'temperature' if name[0] == 't' else 'max_tokens'}'?" in found


def test_envelopes(client):
    text = json.dumps({"messages": [U("你好")], "max_tokens": 2})
    kind = {"Content-Type": "application/json"}
    marked = client.post(CHAT, data="\ufeff" + text, headers=kind)
    assert marked.status_code == 400
    assert "begins with a BOM (UTF-8 signature); send it without" in marked.json["error"]["message"]
    packed = client.post(CHAT, data=gzip.compress(text.encode()), headers=kind | {"Content-Encoding": "gzip"})
    assert packed.status_code == 415 and "is not read: gzip; send it uncompressed" in packed.json["error"]["message"]
    for unpacked in ("", "identity", "Identity"):
        assert client.post(CHAT, data=text, headers=kind | {"Content-Encoding": unpacked}).status_code == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/nlg/text_generate"])
def test_a_slash_at_the_end_is_named(client, path):
    found = client.post(path + "/", json={"messages": [U("你好")]})
    assert (found.status_code, found.json["error"]["code"]) == (404, "not_found")
    assert f"{path}/: 末尾多了斜杠 ends with a slash; ask without it: {path}" == found.json["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/", "/none/", "//"])
def test_no_other_path_is_told_of_its_slash(client, path):
    found = client.post(path, json={})
    assert found.status_code == 404 and "ends with a slash" not in found.json["error"]["message"]


def test_the_bodies_of_the_cases(client, fixtures):
    """All but JSON mode are answered."""
    lines = (fixtures / "cases/api/bodies.jsonl").read_text(encoding="utf-8").splitlines()
    found = {case["name"]: client.post(CHAT, json=case["body"]).status_code for case in map(json.loads, lines)}
    assert found == {name: 400 if name == "json mode" else 200 for name in found} and len(found) >= 8
