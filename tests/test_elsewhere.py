"""--verify ENGINE: an engine in a process of its own, here a false mlx-lm, that answers as the export, or otherwise."""

import json
import sys

import pytest
import torch
from exports import assert_ended, measured
from transformers import AutoModelForCausalLM

from common.config import ExportFlags
from common.elsewhere import asking
from common.errors import UserError
from common.export import folder, proof, verify
from gemma_sft import prompt

LOAD = """
import json, os, subprocess, time

class Net:
    def set_dtype(self, dtype):
        assert dtype == "float32"

class Tokenizer:
    def __init__(self, prompts):
        self.prompts = iter(prompts)

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        assert messages[0]["role"] == "user" and add_generation_prompt and not return_dict
        return next(self.prompts)

def load(path):
    asked = json.load(open(os.environ["FALSE_ANSWERS"]))
    if "error" in asked:
        raise ValueError(asked["error"])
    if "hangs" in asked:
        other = subprocess.Popen(["sleep", "60"])  # holds the pipes too
        open(asked["hangs"], "w").write(str(other.pid))
        time.sleep(60)
    return Net(), Tokenizer(asked.get("prompts", [ids for ids, new in asked["answers"]]))
"""
STEP = """
import json, os

def generate_step(prompt, net, max_tokens):
    pairs = json.load(open(os.environ["FALSE_ANSWERS"]))["answers"]
    for token in [*next(new for ids, new in pairs if ids == prompt), 0, 0][:max_tokens]:
        yield token, None
"""


@pytest.fixture
def answer(tmp_path, monkeypatch):
    """answer([(ids, ids of the answer)], **more): a false mlx-lm is installed, which answers so.

    It is installed for this process, and for the Python in tmp_path.
    """
    files = {
        "mlx/core.py": 'array, float32 = list, "float32"',
        "mlx/__init__.py": "",
        "mlx_lm/__init__.py": LOAD,
        "mlx_lm/generate.py": STEP,
        "mlx-1.5.dist-info/METADATA": "Metadata-Version: 2.1\nName: mlx\nVersion: 1.5\n",
        "mlx_lm-2.5.dist-info/METADATA": "Metadata-Version: 2.1\nName: mlx-lm\nVersion: 2.5\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FALSE_ANSWERS", str(tmp_path / "answers.json"))
    python = f"PYTHONPATH={tmp_path} FALSE_ANSWERS={tmp_path}/answers.json exec {sys.executable}"
    (tmp_path / "python").write_text(f'#!/bin/sh\n{python} "$@"\n')
    (tmp_path / "python").chmod(0o755)

    def say(answers, **more):
        (tmp_path / "answers.json").write_text(json.dumps({"answers": answers} | more))

    return say


@pytest.fixture(scope="module")
def run(gemma):
    """A finished run, exported beside it."""
    run = gemma.train("run", "--max_steps", 4)
    gemma.recipe("export").main(["--model_save_dir", str(run)])
    return run


@pytest.fixture(scope="module")
def own(gemma, run):
    """[(ids of a prompt, ids of the run's answer)]."""
    cfg, _ = gemma.parse(ExportFlags, "--model_save_dir", run)
    tuned = proof.load(cfg, gemma.prompt)
    return list(zip(tuned.prompts, proof.measure(tuned).answers, strict=True))


def check(gemma, run, *flags):
    gemma.recipe("export").main(["--model_save_dir", str(run), "--verify", *map(str, flags)])


def test_an_engine_that_answers_as_the_export_is_accepted(gemma, run, own, answer, capsys):
    answer(own)
    check(gemma, run, "mlx")
    printed = capsys.readouterr().out
    assert printed.count("| 是 yes | 是 yes |") == 8
    assert printed.splitlines()[-1] == f"{run}_merged: 一致 the same text in mlx-lm 2.5, mlx 1.5"


def test_an_engine_of_another_environment_is_asked(gemma, run, own, answer, capsys, tmp_path, monkeypatch):
    answer(own)
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setattr(asking, "check_installed", lambda engine: pytest.fail("this environment may lack it"))
    check(gemma, run, f"mlx={tmp_path}/python", "--output_dir", f"{run}_merged")
    assert "一致 the same text in mlx-lm 2.5" in capsys.readouterr().out


def spoiled(own):
    """The first answer with its second id changed."""
    (ids, (first, second, *rest)), *others = own
    return [(ids, [first, second + 1, *rest]), *others]


def test_another_answer_is_caught(gemma, run, own, answer, capsys):
    answer(spoiled(own))
    with pytest.raises(UserError, match="--verify mlx: 1 个回答不同 of 8 answers differ at more than a tie"):
        check(gemma, run, "mlx")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  1 |"))
    assert "| 否 no |" in line and "(token 2)" in line


def test_the_exit_code_says_so(gemma, run, own, answer, forked, tmp_path):
    answer(spoiled(own))
    done = forked("export.py", "--model_save_dir", run, "--verify", f"mlx={tmp_path}/python")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "1 个回答不同 of 8 answers differ" in done.stderr


def test_a_tie_is_no_error(gemma, run, own, answer, capsys, monkeypatch):
    answer(spoiled(own))
    monkeypatch.setattr(verify.proof, "TOLERANCE", proof.TOLERANCE | {torch.bfloat16: 1e3})
    check(gemma, run, "mlx", "--dtype", "bfloat16")
    assert "| 平局 tie |" in capsys.readouterr().out


def test_another_template_is_caught(gemma, run, own, answer, capsys):
    answer(own, prompts=[[*ids[:-1], 9] for ids, _ in own])
    with pytest.raises(UserError, match="--verify mlx: 8 个提示的编号不同 of 8 prompts get other ids by its template"):
        check(gemma, run, "mlx")
    assert capsys.readouterr().out.count("| 否 no | 是 yes |") == 8


def test_an_engine_that_hangs_is_stopped(gemma, run, own, answer, monkeypatch, tmp_path):
    answer(own, hangs=str(tmp_path / "pid"))
    monkeypatch.setattr(asking, "LIMIT", 4.0)
    with pytest.raises(UserError, match=r"mlx: . 秒后仍没有回答 still has no answer from .*_merged after 4 s"):
        check(gemma, run, "mlx")
    assert_ended(tmp_path / "pid")


def test_an_engine_that_fails_says_why_in_one_line(gemma, run, own, answer):
    answer(own, error="Model type gemma9 not supported.")
    with pytest.raises(UserError) as caught:
        check(gemma, run, "mlx")
    assert str(caught.value) == (
        f"mlx 不能回答 cannot answer from {run}_merged: ValueError: Model type gemma9 not supported."
    )


def test_an_export_of_other_weights_is_caught(gemma, run, own, answer):
    answer(own)
    other = gemma.train("other", "--max_steps", 8)
    with pytest.raises(UserError, match="run_merged 回答得与训练结果不同 does not answer as the run: export again"):
        check(gemma, other, "mlx", "--output_dir", f"{run}_merged")


@pytest.mark.parametrize(("engine", "remedy"), [(name, engine.pip) for name, engine in asking.ENGINES.items()])
def test_without_the_engine_the_remedy_is_named(gemma, run, engine, remedy, monkeypatch):
    found = asking.importlib.util.find_spec
    hidden = {name.partition(".")[0] for name in asking.ENGINES[engine].modules}
    monkeypatch.setattr(asking.importlib.util, "find_spec", lambda name: None if name in hidden else found(name))
    with pytest.raises(UserError) as caught:
        check(gemma, run, engine)
    assert str(caught.value) == f"--verify {engine} 没有安装 is not installed: pip install {remedy}"


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (
            ["mlx", "--output_dir", "nowhere"],
            "nowhere 不是导出的完整模型 is no exported whole model: export the run first",
        ),
        (["mlx=nowhere/python"], "--verify mlx=nowhere/python: 没有这个文件 no such file"),
    ],
)
def test_what_cannot_be_asked_is_refused(gemma, run, flags, match):
    with pytest.raises(UserError, match=match):
        check(gemma, run, *flags)


@pytest.mark.parametrize(
    ("script", "mode", "match"),
    [
        ("#!/bin/sh\n", 0o755, "没有回答 gave no answer, is it a Python"),
        ("#!/bin/sh\n", 0o644, "不能运行 cannot be run: Permission denied"),
        ("\0", 0o755, "不能运行 cannot be run: Exec format error"),
    ],
)
def test_what_is_no_python_is_named_in_one_line(script, mode, match, tmp_path):
    (tmp_path / "python").write_text(script)
    (tmp_path / "python").chmod(mode)
    with pytest.raises(UserError, match=match):
        asking.ask("mlx", tmp_path, asking.Questions([[1]], [None], [], 1, 1), str(tmp_path / "python"))


def test_what_an_engine_prints_at_its_end_is_no_answer(tmp_path):
    found = {"versions": {"mlx": "1"}, "prompts": [None], "answers": [[2]], "seconds": 0.5}
    (tmp_path / "python").write_text(f"#!/bin/sh\necho '{json.dumps(found)}'\necho bye\n")
    (tmp_path / "python").chmod(0o755)
    asked = asking.Questions([[1]], [None], [], 1, 1)
    assert asking.ask("mlx", tmp_path, asked, str(tmp_path / "python")) == asking.Found(**found)


def test_the_process_answers_as_this_one(small_gemma, tmp_path):
    """transformers, which the benchmark asks as an engine, in a process of its own."""
    expected = measured(small_gemma, prompt, AutoModelForCausalLM.from_pretrained(small_gemma))
    tuned = expected.tuned
    folder.save(tuned.net, tuned, tmp_path / "whole", prompt)
    messages = [[{"role": turn.role, "content": turn.text} for turn in turns] for turns in tuned.questions]
    asked = asking.Questions(tuned.prompts, [*messages[:-1], None], tuned.stop_ids, proof.NEW_TOKENS, 1)
    found = asking.ask("transformers", tmp_path / "whole", asked)
    assert found.answers == expected.answers and found.prompts == [*tuned.prompts[:-1], None]
    assert found.seconds > 0 and set(found.versions) == {"transformers", "torch"}
    with pytest.raises(UserError, match="transformers 不能回答 cannot answer from .*: "):
        asking.ask("transformers", tmp_path, asked)


def test_where_ids_part():
    logits = torch.tensor([[3.0, 1.0, 0.5], [0.0, 2.0, 1.5], [1.0, 0.0, 0.0]])
    assert verify.parted_ids([0, 1], [0, 1], logits) is None
    assert verify.parted_ids([0, 2], [0, 1], logits) == (1, 0.5)
    assert verify.parted_ids([0, 1, 2], [0, 1], logits) == (2, 1.0)
    assert verify.parted_ids([0], [0, 1], logits) == (1, float("inf"))
    assert verify.parted_ids([], [0, 1], logits) == (0, float("inf"))
