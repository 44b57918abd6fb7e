"""Every command of the READMEs, run in order in a copy of the project, and what a user then has."""

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow
ROWS = [{"query": f"{n}+1=", "response": str(n + 1)} for n in range(40)]
FILES = """adapter_config.json adapter_model.safetensors tokenizer.json chat_template.jinja run_manifest.json
trainer_log.jsonl training_loss.png all_results.json predictions.jsonl rejected.jsonl README.md"""


def commands(readme):
    """The lines of the ```bash blocks, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), flags=re.S)
    return [line for block in blocks for line in block.strip().splitlines()]


DEFAULT_RUN, TESTS = commands("README.md")[0], "pip install -r requirements-dev.txt && python -m pytest"
SERVER = "post_api.py"
STARTERS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
    "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the project as a fresh clone has it, with the two data files README speaks of."""
    folder = tmp_path_factory.mktemp("readme") / "clone"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "model_sft*", "__pycache__", ".venv"))
    for name in ("my.jsonl", "held_out.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.fixture(scope="module")
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def command_of(small_gemma, small_qwen, small_chatglm, port):
    """A line of README as the test runs it: a small checkpoint for the real one, a free port, nothing installed."""

    def make(line):
        line = line.removeprefix("pip install -r requirements.txt && ")  # .ci/run installs
        line = line.replace("google/gemma-2b-it", str(small_gemma)).replace("8044", str(port))
        line = line.replace("Qwen/Qwen1.5-0.5B-Chat", str(small_qwen))
        line = line.replace("THUDM/chatglm-6b", str(small_chatglm))
        first, *words = shlex.split(line)
        return [*STARTERS.get(first, [first]), *words]

    return make


@pytest.fixture(scope="module")
def run(clone, command_of, environment):
    def run(line):
        done = subprocess.run(command_of(line), cwd=clone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
        return done.stdout

    return run


@pytest.fixture(scope="module")
def default_run(run):
    return run(DEFAULT_RUN)


@pytest.fixture(scope="module")
def folder(clone, default_run):
    return clone / "gemma_sft/ft_gemma/model_sft"


def test_both_readmes_have_the_same_commands():
    assert commands("README.md") == commands("README_zh.md")
    assert DEFAULT_RUN == "pip install -r requirements.txt && python gemma_sft/ft_gemma/train.py"
    assert TESTS in commands("README.md")


def test_the_default_run_leaves_every_file(folder, default_run):
    assert [name for name in FILES.split() if not (folder / name).is_file()] == []
    assert list(folder.glob("checkpoint-*/whole.json"))
    assert "held-out rows: 200" in default_run and default_run.count("微调 tuned:") == 3


def test_tuning_helps(folder):
    results = json.loads((folder / "all_results.json").read_text())
    base, tuned = results["base"], results["tuned"]
    assert tuned["bleu-4"] >= 3 * base["bleu-4"] and tuned["bleu-4"] > 0.1
    assert tuned["rouge-l-f"] >= 1.5 * base["rouge-l-f"]
    assert tuned["attributes"] >= 0.85
    assert results["padding"] < 0.05


def test_its_answers_end_by_themselves(folder):
    stops = [json.loads(line)["stop"] for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(stops) == 200 and stops.count("stop") >= 195


def test_the_other_commands_run(clone, run, folder, command_of, environment):
    """In README's order; the service runs while curl talks to it, and ends when it is told to."""
    server, outputs = None, {}
    try:
        for line in commands("README.md"):
            if line in (DEFAULT_RUN, TESTS):
                continue
            if SERVER in line:
                server = subprocess.Popen(
                    command_of(line), cwd=clone, env=environment, stdout=subprocess.PIPE, text=True
                )
                assert "listening on http://127.0.0.1:" in server.stdout.readline()
                continue
            outputs[line] = run(line)
    finally:
        if server:
            server.terminate()
            server.wait(30)
            server.stdout.close()
    answer, health = (json.loads(output) for line, output in outputs.items() if line.startswith("curl"))
    assert isinstance(answer, str) and health["status"] == "ok"
    assert (clone / "out/adapter_model.safetensors").is_file()
    queries = [output for line, output in outputs.items() if "--query" in line and "out" not in line]
    assert len(queries) == 2 and all(query.strip() for query in queries)
    check_qwen(clone / "qwen2_sft/ft_qwen2/model_sft")
    check_chatglm(clone / "chatglm_sft/ft_chatglm/model_sft")
    prompt = next(json.loads(output) for line, output in outputs.items() if "--print_prompt" in line)
    assert prompt["text"] == "<bos><start_of_turn>user\n你好<end_of_turn>\n<start_of_turn>model\n"


def check_qwen(folder):
    """Qwen's default run learns Gemma's task as well."""
    results = json.loads((folder / "all_results.json").read_text())
    assert results["tuned"]["bleu-4"] > max(0.1, 3 * results["base"]["bleu-4"])
    assert results["tuned"]["attributes"] >= 0.8


def check_chatglm(folder):
    """ChatGLM's default run finds entities whose names it has never seen, within four minutes; its loss falls."""
    results = json.loads((folder / "all_results.json").read_text())
    assert results["tuned"]["entity-f1"] >= 0.8 > results["base"].get("entity-f1", 0)
    assert all(results["tuned"][f"entity-f1 {kind}"] >= 0.7 for kind in ("人名", "地名", "机构名"))
    losses = [json.loads(line)["loss"] for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] / 2


def test_what_the_readmes_promise_is_in_the_code():
    """Shapes shown as JSON are read; knobs named as flags exist."""
    from common.config import EvaluationFlags, ExportFlags, PredictFlags, ServeFlags, TrainFlags
    from common.data.formats import turns_of
    from common.knobs import ALIASES
    from gemma_sft.ft_gemma.config import Config

    known = {*ALIASES, "config", "help"}
    known |= {"nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "config_file"}  # the launchers'
    for cls in (Config, TrainFlags, PredictFlags, EvaluationFlags, ServeFlags, ExportFlags):
        known |= set(cls.__dataclass_fields__)
    for name in ("README.md", "README_zh.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        rows = [line for block in re.findall(r"```json\n(.*?)```", text, flags=re.S) for line in block.splitlines()]
        assert len(rows) == 16 and all(turns_of(json.loads(row)) for row in rows)
        assert set(re.findall(r"--([a-z_]+)", text)) - known == set()
