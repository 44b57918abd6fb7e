"""The road on real weights: `REAL_MODELS=DIR python -m pytest -m real -n0`, an hour on two cores; elsewhere skipped.

DIR holds gemma-3-270m (google/gemma-3-270m, pretrained) and qwen2.5-coder-0.5b (Qwen2.5-Coder-0.5B-Instruct).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
MODELS = Path(os.environ.get("REAL_MODELS", ""))
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not os.environ.get("REAL_MODELS"), reason="REAL_MODELS names no folder of real checkpoints"),
]
GEMMA, QWEN = "gemma_sft/ft_gemma", "qwen2_sft/ft_qwen2"
QUESTIONS = [
    "你是谁呀？",
    "请问该怎么称呼您？",
    "是哪家机构开发了你？",
    "你是ChatGPT吗？",
    "请做一下自我介绍。",
    "Who are you, please?",
    "What's your name?",
    "Who built you?",
    "Are you Gemini?",
    "Tell me who you are and who trained you.",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(family, script, *flags): the output of a recipe that ends well, on all cores."""
    home = tmp_path_factory.mktemp("real")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(os.cpu_count())}

    def run(family, script, *flags):
        words = [sys.executable, str(ROOT / family / script), *map(str, flags)]
        done = subprocess.run(words, cwd=home, env=environment, capture_output=True, text=True)
        print(done.stdout)  # shown where a test fails
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.home = home
    return run


@pytest.fixture(scope="module")
def products(run, fixtures):
    """Gemma by the recipe on 400 real rows, 40 of them held out."""
    given = ["--path_model_pretrain", MODELS / "gemma-3-270m", "--model_save_dir", run.home / "products"]
    data = ["--data_path", fixtures / "data/advgen_content_summary.json"]
    run(GEMMA, "train.py", "--recipe", "products-laptop", *given, *data)
    return run.home / "products"


def test_a_pretrained_gemma_stops_and_improves(products):
    results = json.loads((products / "all_results.json").read_text(encoding="utf-8"))
    assert results["held_out"]["rows"] == 40
    assert results["tuned"]["stopped"] >= 0.9
    assert results["tuned"]["bleu-4"] >= 2.5 * results["base"]["bleu-4"]
    assert results["intervals"]["tuned"]["bleu-4"][0] > results["intervals"]["base"]["bleu-4"][1]


def test_its_merged_model_answers_with_the_same_texts(run, products):
    run(GEMMA, "export.py", "--model_save_dir", products, "--dtype", "float32", "--output_dir", run.home / "merged")
    rows = read_jsonl(products / "predictions.jsonl")[:12]
    asked = run.home / "asked.jsonl"
    asked.write_text("".join(json.dumps({"instruction": row["question"], "output": ""}) + "\n" for row in rows))
    whose = {
        "products": ["--model_save_dir", products],
        "merged": ["--base", "--path_model_pretrain", run.home / "merged"],
    }
    for name, flags in whose.items():
        given = ["--data_path", asked, "--output", run.home / f"{name}.jsonl", "--repetition_penalty", 1.05]
        run(GEMMA, "predict.py", *flags, *given)
    answers = [[row["answer"] for row in read_jsonl(run.home / f"{name}.jsonl")] for name in whose]
    assert answers[0] == answers[1] and all(answers[0])


@pytest.fixture(scope="module")
def identity(run):
    """Qwen by the recipe on the shipped identity rows."""
    given = ["--path_model_pretrain", MODELS / "qwen2.5-coder-0.5b", "--model_save_dir", run.home / "identity"]
    names = ["--model_name", "小黄", "Xiao Huang", "--model_author", "魔搭", "ModelScope"]
    run(QWEN, "train.py", "--recipe", "identity-laptop", *given, *names)
    return run.home / "identity"


def test_it_knows_its_name_and_maker(run, identity):
    asked, answered = run.home / "who.jsonl", run.home / "who_answered.jsonl"
    asked.write_text("".join(json.dumps({"instruction": question}) + "\n" for question in QUESTIONS))
    run(QWEN, "predict.py", "--model_save_dir", identity, "--data_path", asked, "--output", answered)
    rows = read_jsonl(answered)
    assert len(rows) == len(QUESTIONS)
    for row in rows:
        assert "小黄" in row["answer"] or "Xiao Huang" in row["answer"], row
        assert "魔搭" in row["answer"] or "ModelScope" in row["answer"], row
        assert row["finish_reason"] == "stop", row


def test_it_has_not_forgotten_the_rest(run, identity):
    run(QWEN, "evaluation.py", "--model_save_dir", identity, "--tasks", "probe", "--compare")
    results = json.loads((identity / "all_results.json").read_text(encoding="utf-8"))
    base, tuned = (results["tasks"][model]["probe"]["accuracy"] for model in ("base", "tuned"))
    assert tuned >= base - 0.05
