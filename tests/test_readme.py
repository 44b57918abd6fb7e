"""Every command of the READMEs, run in order in a copy of the project, and what a user then has."""

import json

import pytest
from commands import Project, commands

pytestmark = pytest.mark.slow
FILES = """adapter_config.json adapter_model.safetensors tokenizer.json chat_template.jinja run_manifest.json
trainer_log.jsonl training_loss.png all_results.json predictions.jsonl rejected.jsonl README.md"""
DEFAULT_RUN, TESTS = commands("README.md")[0], "pip install -r requirements-dev.txt && python -m pytest"
# Gemma's and Qwen's default runs have their data, task and knobs, and half and a quarter of their steps
SHORTER = {
    DEFAULT_RUN: " --max_steps 245",
    "python gemma_sft/ft_gemma/evaluation.py --compare": " --eval_rows 50",
    "python qwen2_sft/ft_qwen2/train.py": " --max_steps 120 --eval_rows 50",
    "python chatglm_sft/ft_chatglm/train.py": " --eval_rows 60",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory, small_models, environment, warm):
    project = Project(tmp_path_factory.mktemp("readme") / "clone", small_models, environment, warm)
    yield project
    project.end()


@pytest.fixture(scope="module")
def default_run(project):
    return project.run(DEFAULT_RUN + SHORTER[DEFAULT_RUN], fork=False)  # as a user starts it


@pytest.fixture(scope="module")
def folder(project, default_run):
    return project.folder / "gemma_sft/ft_gemma/model_sft"


def test_the_first_command_is_the_default_run():
    assert DEFAULT_RUN == "pip install -r requirements.txt -c constraints.txt && python gemma_sft/ft_gemma/train.py"
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


def test_the_other_commands_run(project, folder):
    """In README's order; the service runs while curl talks to it, and ends when it is told to."""
    lines = [line for line in commands("README.md") if line not in (DEFAULT_RUN, TESTS)]
    assert SHORTER.keys() <= {*lines, DEFAULT_RUN}
    outputs = {line: project.run(line + SHORTER.get(line, "")) for line in lines}
    project.end()
    answer, health = (json.loads(output) for line, output in outputs.items() if line.startswith("curl"))
    assert isinstance(answer, str) and health["status"] == "ok"
    assert (project.folder / "out/adapter_model.safetensors").is_file()
    queries = [output for line, output in outputs.items() if "--query" in line and "out" not in line]
    assert len(queries) == 2 and all(query.strip() for query in queries)
    check_qwen(project.folder / "qwen2_sft/ft_qwen2/model_sft")
    check_chatglm(project.folder / "chatglm_sft/ft_chatglm/model_sft")


def check_qwen(folder):
    """Qwen's run learns Gemma's task as well, in a quarter of the steps."""
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
