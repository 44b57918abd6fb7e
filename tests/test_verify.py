"""--verify: servers that answer as the run does, as the base, otherwise, or under names that do not tell."""

import http.server
import json
import threading

import pytest
from exports import measured
from transformers import AutoModelForCausalLM

from common.config import ExportFlags
from common.errors import UserError
from common.export import llama_cpp, proof, verify
from gemma_sft import prompt


class Fake(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server that answers prompts of ids from `self.server.texts`: {model: {ids: text}}."""

    def do_GET(self):
        self.say({"data": [{"id": name} for name in self.server.texts]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = self.server.texts[body["model"]][tuple(body["prompt"])]
        self.say({"choices": [{"text": text, "finish_reason": "length"}], "usage": {"completion_tokens": 1}})

    def say(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """serve({model: {ids: text}}): the address of a Fake."""
    servers = []

    def start(texts):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fake)
        server.texts = texts
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def run(gemma):
    return gemma.train("run", "--max_steps", 4)


@pytest.fixture(scope="module")
def answers(gemma, run):
    """({ids: the run's text}, {ids: the base's})."""
    cfg, _ = gemma.parse(ExportFlags, "--model_save_dir", run)
    tuned = proof.load(cfg, gemma.prompt)

    def texts():
        pairs = zip(tuned.prompts, proof.measure(tuned).answers, strict=True)
        return {tuple(ids): tuned.tokenizer.decode(new, skip_special_tokens=True) for ids, new in pairs}

    own = texts()
    with tuned.net.disable_adapter():
        base = texts()
    assert set(own.values()) != set(base.values()), "else nothing is told apart"
    return own, base


def check(gemma, run, url, *flags):
    gemma.recipe("export").main(["--model_save_dir", str(run), "--verify", url, *flags])


@pytest.mark.parametrize("name", ["tuned", "run", "run:latest", "some/run"])
def test_a_server_that_answers_as_the_run_is_accepted(gemma, run, answers, serve, capsys, name):
    url = serve({"base": answers[1], name: answers[0]})
    check(gemma, run, url)
    printed = capsys.readouterr().out
    assert f"{url}: 一致 the same text" in printed
    tables = [printed.partition(f"{one}:  提示 prompt")[2] for one in (name, "base")]
    assert all(table.count("| 是 yes |") >= 8 for table in tables)


def test_a_merged_model_under_any_name_is_accepted(gemma, run, answers, serve):
    check(gemma, run, serve({"m": answers[0]}))


def test_the_base_under_the_adapters_name_is_caught(gemma, run, answers, serve, capsys):
    with pytest.raises(UserError, match="tuned 的回答是基座的 answers as the base does, not as the run"):
        check(gemma, run, serve({"base": answers[1], "tuned": answers[1]}))
    assert "| 否 no |" in capsys.readouterr().out
    with pytest.raises(UserError, match="the adapter is not applied"):
        check(gemma, run, serve({"tuned": answers[1]}))


def test_the_exit_code_says_so(answers, serve, run, forked):
    done = forked("export.py", "--model_save_dir", run, "--verify", serve({"tuned": answers[1]}))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the adapter is not applied" in done.stderr


def test_another_text_is_counted(gemma, run, answers, serve, capsys):
    first, *_ = answers[0]
    spoiled = answers[0] | {first: "x" + answers[0][first]}
    with pytest.raises(UserError, match="tuned: 1 个回答不同 of 8 answers differ at more than a tie"):
        check(gemma, run, serve({"tuned": spoiled}))
    assert "(token 1)" in capsys.readouterr().out


def test_a_base_that_is_another_model_is_told(gemma, run, answers, serve):
    with pytest.raises(UserError, match="base: [1-8] 个回答不同"):
        check(gemma, run, serve({"base": answers[0], "tuned": answers[0]}))


@pytest.mark.parametrize(
    ("names", "match"),
    [(["a", "b"], "which of a, b is the run's. serve it as run"), (["base"], "no model but the base: base")],
)
def test_names_that_do_not_tell(gemma, run, answers, serve, names, match):
    with pytest.raises(UserError, match=match):
        check(gemma, run, serve(dict.fromkeys(names, answers[0])))


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--verify", "tgi"], "--verify tgi: 未知 unknown; give llama.cpp, mlx, .* or a URL"),
        (["--verify", "http://127.0.0.1:9/v1", "--format", "gguf"], "nothing is written"),
        (["--verify", "http://127.0.0.1:9/v1", "--output_dir", "x"], "a server is asked"),
        (["--verify", "llama.cpp", "--output_dir", "nowhere"], "nowhere 里应有一个 .gguf holds 0 GGUF files"),
    ],
)
def test_what_cannot_be_asked_is_refused(gemma, run, flags, match):
    with pytest.raises(UserError, match=match):
        gemma.recipe("export").main(["--model_save_dir", str(run), *flags])


def test_without_llama_cpp_the_remedy_is_named(gemma, run, tmp_path, monkeypatch):
    (tmp_path / "x.gguf").touch()
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)
    with pytest.raises(UserError, match="pip install xllamacpp"):
        check(gemma, run, "llama.cpp", "--output_dir", str(tmp_path))


def test_llama_cpp_is_asked(gemma, run, tmp_path, capsys):
    pytest.importorskip("xllamacpp")
    flags = ["--model_save_dir", run, "--format", "gguf", "--gguf_type", "f32", "--output_dir", tmp_path / "m"]
    gemma.recipe("export").main([str(flag) for flag in flags])
    check(gemma, run, "llama.cpp", "--output_dir", str(tmp_path / "m"))
    assert "greedy answers equal 8/8" in capsys.readouterr().out.splitlines()[-1]


def test_where_a_text_parts_is_found(small_gemma):
    net = AutoModelForCausalLM.from_pretrained(small_gemma)
    expected = measured(small_gemma, prompt, net)
    tuned, logits = expected.tuned, expected.logits[0]
    ids = tuned.tokenizer("abcdef", add_special_tokens=False).input_ids
    parted = verify.parted(tuned, "abcx", ids, logits, prompt)
    best = logits[3].topk(2).values
    assert parted == (3, float(best[0] - best[1]))
    assert verify.parted(tuned, "abcdef", ids, logits, prompt) is None
