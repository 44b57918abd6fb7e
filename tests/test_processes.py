"""Several processes train what one would: real launches by torchrun and accelerate of two processes on the CPU."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatglm_sft.ft_chatglm3 import train as train_chatglm3
from common import distributed
from common.cli import parse
from common.errors import UserError
from common.training import batches
from gemma_sft.ft_gemma import train
from gemma_sft.ft_gemma.config import Config

ROOT = Path(__file__).resolve().parents[1]
TRAIN = [str(ROOT / "gemma_sft/ft_gemma/train.py")]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
ZERO2, ZERO3 = (["--deepspeed", str(ROOT / f"configs/deepspeed/zero{stage}.json")] for stage in (2, 3))
DDP_FILE, FSDP2_FILE = (str(ROOT / f"configs/accelerate/{name}.yaml") for name in ("ddp", "fsdp2"))
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (requirements-deepspeed.txt)"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where the module's runs go, with 43 rows of several lengths: no whole number of batches, for any process."""
    folder = tmp_path_factory.mktemp("processes")
    rows = [{"query": f"{n}+{n * 7 % 50}", "response": str(n + n * 7 % 50) * (1 + n % 4)} for n in range(43)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def flags(home, small_gemma):
    """flags(name, *more): the command line of a run into home/name: 9 steps of 8 rows, 5 an epoch."""

    def flags(name, *more):
        given = ["--path_model_pretrain", small_gemma, "--data_path", home / "rows.jsonl"]
        given += ["--model_save_dir", home / name, "--cache_dir", home / "cache", "--val_set_size", 5]
        given += ["--learning_rate", 0.01, "--lora_dropout", 0, "--batch_size", 8, "--micro_batch_size", 2]
        given += ["--max_steps", 9, "--save_steps", 4, "--logging_steps", 1, "--eval_rows", 0, "--max_new_tokens", 12]
        return [str(flag) for flag in [*given, *more]]

    return flags


@pytest.fixture(scope="module")
def start(environment):
    """start(launcher, script and its flags): the launcher's process, under way."""

    def start(launcher, command):
        words = [sys.executable, "-m", *launcher, *command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(words, env=environment | {"OMP_NUM_THREADS": "1"}, **pipes)

    return start


@pytest.fixture(scope="module")
def finish(start):
    """finish(launcher, command): its (exit code, stdout, stderr)."""

    def finish(launcher, command):
        process = start(launcher, command)
        try:
            output, errors = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its processes
            output, errors = process.communicate()
        return process.returncode, output, errors

    return finish


@pytest.fixture(scope="module")
def alone(home, flags):
    """What one process trains, on the same rows in batches of the same size."""
    train.main(flags("alone", "--micro_batch_size", 8))
    return home / "alone"


def log(folder, name="trainer_log.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def error_lines(errors):
    return [line[line.index("错误 error:") :] for line in errors.splitlines() if "错误 error:" in line]


def assert_same_training(folder, other, tolerance):
    """The same losses, validation losses, tokens and gradient norms, step by step; the same adapter."""
    found, expected = log(folder), log(other)
    assert [record["step"] for record in found] == list(range(1, 10))
    assert [record["tokens"] for record in found] == [record["tokens"] for record in expected]
    for name in ("loss", "grad_norm", "eval_loss"):
        assert [record.get(name) for record in found] == [
            pytest.approx(record[name], abs=tolerance) if name in record else None for record in expected
        ]
    assert [record["step"] for record in found if "eval_loss" in record] == [4, 8, 9]
    tensors, others = adapter(folder), adapter(other)
    assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
        name: (t.shape, t.dtype) for name, t in others.items()
    }
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=1e-3)


# ---------------------------------------------------------------- one process's part


def test_pain_21_every_process_has_a_row_in_every_step():
    lengths = [(n * 37) % 100 + 1 for n in range(43)]
    one = batches.LengthGroupedSampler(lengths, 8, seed=1)
    two = batches.LengthGroupedSampler(lengths, 8, seed=1, multiple=4)
    assert list(two) == [*one, batches.BLANK] and len(two) == 44
    assert batches.LengthGroupedSampler(lengths[:40], 8, seed=1, multiple=4).blanks == 0


def test_a_blank_row_is_not_counted():
    from datasets import Dataset

    rows = Dataset.from_dict({"input_ids": [[2, 7]], "labels": [[-100, 7]], "where": ["f:1"]}).with_format("numpy")
    batch = batches.collate(batches.RowsAndBlanks(rows).__getitems__([0, batches.BLANK]), pad_id=0)
    assert batch["input_ids"].tolist() == [[2, 7], [2, 7]] and batch["tokens"] == 2
    assert batch["labels"].tolist() == [[-100, 7], [-100, -100]] and batch["where"] == ["f:1", ""]


def test_deepspeed_that_is_not_there_is_named(flags, monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="DeepSpeed is not installed: pip install -r requirements-deepspeed.txt"):
        distributed.join(parse(Config, None, flags("none", *ZERO2)))


def test_two_optimizers_are_one_too_many(flags, tmp_path):
    (tmp_path / "own.json").write_text('{"optimizer": {"type": "AdamW"}}', encoding="utf-8")
    argv = flags("none", "--deepspeed", tmp_path / "own.json", "--optim", "sgd")
    with pytest.raises(UserError, match="--optim sgd: .*own.json 里已有 names an optimizer too"):
        distributed.join(parse(Config, None, argv))


@needs_deepspeed
def test_deepspeed_needs_a_launcher(flags):
    with pytest.raises(UserError, match="torchrun --nproc_per_node 2"):
        distributed.join(parse(Config, None, flags("none", *ZERO2)))


def test_a_deepspeed_file_that_is_not_there_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(Config, None, flags("none", "--deepspeed", "zero9.json"))
    assert stopped.value.code == 2 and "--deepspeed zero9.json" in capsys.readouterr().err


# ---------------------------------------------------------------- two processes


@pytest.mark.slow
def test_pain_21_ddp_over_uneven_rows_trains_what_one_process_does(home, flags, finish, alone):
    more = ["--eval_data_path", home / "rows.jsonl", "--eval_rows", 2]
    code, output, errors = finish(TORCHRUN, TRAIN + flags("ddp", *more))
    assert code == 0, errors
    assert_same_training(home / "ddp", alone, 1e-4)
    for text in ("第一条样本", "可训练参数", "完成 done", "留出数据 held-out rows: 2"):
        assert output.count(text) == 1, text
    assert "2 × 2 × 2 DDP" in output and "rank" not in errors.lower()
    assert errors.count("评估微调 tuned: 100%") > 0 and errors.count("9/9") > 0
    results = json.loads((home / "ddp/all_results.json").read_text())
    assert {"base", "tuned"} <= results.keys() and results["steps"] == 9
    manifest = json.loads((home / "ddp/run_manifest.json").read_text())
    assert manifest["state"] == "finished" and manifest["processes"] == "2 DDP"


@pytest.mark.slow
def test_ddp_trains_a_model_of_this_project_too(home, flags, finish, small_chatglm3):
    one, two = (["--path_model_pretrain", small_chatglm3, "--micro_batch_size", rows] for rows in (8, 2))
    train_chatglm3.main(flags("chatglm3", *one))
    code, output, errors = finish(TORCHRUN, [str(ROOT / "chatglm_sft/ft_chatglm3/train.py"), *flags("ddp3", *two)])
    assert code == 0, errors
    assert_same_training(home / "ddp3", home / "chatglm3", 1e-4)


@pytest.mark.slow
def test_two_processes_train_rows_of_control_tokens_as_one_does(home, flags, finish):
    rows = ["--train_template_tokens", "true"]
    train.main(flags("rows_alone", "--micro_batch_size", 8, *rows))
    code, _, errors = finish(TORCHRUN, TRAIN + flags("rows", *rows))
    assert code == 0, errors
    assert_same_training(home / "rows", home / "rows_alone", 1e-4)
    assert [name for name in adapter(home / "rows") if "trainable_tokens_delta" in name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, launcher, more",
    [
        pytest.param("zero2", TORCHRUN, ZERO2, marks=needs_deepspeed),
        pytest.param("zero3", TORCHRUN, ZERO3, marks=needs_deepspeed),
        ("fsdp2", [*ACCELERATE, FSDP2_FILE], []),
    ],
)
def test_parts_in_each_process_train_what_one_does(home, flags, finish, warm, alone, name, launcher, more):
    """Then from the checkpoint in the middle, in another folder."""
    code, output, errors = finish(launcher, TRAIN + flags(name, *more, "--eval_rows", 2))
    assert code == 0, errors
    assert output.count("完成 done") == 1 and output.count("留出数据 held-out rows: 2") == 1
    assert_same_training(home / name, alone, 1e-4)
    kind = json.loads((home / name / "run_manifest.json").read_text())["processes"]
    assert kind == {"zero2": "2 ZeRO-2", "zero3": "2 ZeRO-3", "fsdp2": "2 FSDP2"}[name]
    answered, expected = (
        [(line["step"], line["where"], line["answer"]) for line in log(home / run, "samples.jsonl")]
        for run in (name, alone)
    )
    assert answered == expected and len(expected) == 3 * 4

    again = ["--resume", home / name / "checkpoint-4"]
    code, output, errors = warm.run(["-m", *launcher, *TRAIN, *flags(f"{name}_resumed", *more, *again)], home)
    assert code == 0, errors
    resumed, whole = log(home / f"{name}_resumed"), log(home / name)
    assert [record["step"] for record in resumed] == list(range(1, 10)), "the log up to the checkpoint comes along"
    assert [record["loss"] for record in resumed] == pytest.approx([record["loss"] for record in whole], abs=1e-6)
    first, second = adapter(home / name), adapter(home / f"{name}_resumed")
    for tensor in first:
        torch.testing.assert_close(first[tensor], second[tensor], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, launcher, more",
    [
        ("ddp", TORCHRUN, []),
        pytest.param("zero3", TORCHRUN, ZERO3, marks=needs_deepspeed),
        ("fsdp2", [*ACCELERATE, FSDP2_FILE], []),
    ],
)
def test_from_an_adapter_they_train_what_one_does(home, flags, warm, alone, name, launcher, more):
    given = ["--adapter_name_or_path", alone, "--max_steps", 2, "--learning_rate", 0.001]
    if not (home / "alone_on").is_dir():
        train.main(flags("alone_on", "--micro_batch_size", 8, *given))
    code, output, errors = warm.run(["-m", *launcher, *TRAIN, *flags(f"{name}_on", *more, *given)], home)
    assert code == 0, errors
    assert output.count(f"起点 start: {alone}: ") == 1
    found, expected = log(home / f"{name}_on"), log(home / "alone_on")
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in expected], abs=1e-4)
    assert expected[0]["loss"] < log(alone)[0]["loss"] - 0.02, "it does not start from the base"
    for tensor, value in adapter(home / "alone_on").items():
        torch.testing.assert_close(adapter(home / f"{name}_on")[tensor], value, rtol=0, atol=1e-3)


def workers(launcher):
    """Process ids that `launcher` (a Popen) started, first process first."""
    listed = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    found = {}
    for pid in listed:
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        rank = [value for value in environ if value.startswith(b"RANK=")]
        if rank:
            found[int(rank[0][5:])] = int(pid)
    return [found[rank] for rank in sorted(found)]


def wait_for_steps(folder, count, process):
    path = folder / "trainer_log.jsonl"
    while not (path.exists() and len(path.read_text().splitlines()) >= count):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_then_stopped_then_resumed(home, flags, start, finish):
    """kill -9 of one process ends all; SIGTERM saves a checkpoint; another number of processes is refused."""
    long = flags("stopped", "--max_steps", 2000, "--epochs", 400, "--save_steps", 5)
    killed = start(TORCHRUN, TRAIN + long)
    wait_for_steps(home / "stopped", 7, killed)
    os.kill(workers(killed)[1], signal.SIGKILL)
    _, errors = killed.communicate(timeout=60)
    assert killed.returncode != 0 and "[rank0]" not in errors  # torch puts it before a worker's traceback
    steps = len(log(home / "stopped"))

    stopped = start(TORCHRUN, TRAIN + long)
    wait_for_steps(home / "stopped", steps + 3, stopped)
    stopped.send_signal(signal.SIGTERM)
    output, errors = stopped.communicate(timeout=60)
    assert "从检查点继续 resuming from" in output
    assert stopped.returncode != 0 and ["SIGTERM" in line for line in error_lines(errors)] == [True]
    last = log(home / "stopped")[-1]["step"]
    assert last < 2000 and (home / f"stopped/checkpoint-{last}/whole.json").is_file()

    with pytest.raises(UserError, match="processes: 2 DDP → 1"):
        train.main(long)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_ends_all(home, flags, warm, small_gemma):
    """A row whose token overflows in the first layer: its process sees it, all stop, one line names the row."""
    base = home / "broken"
    base.mkdir()
    for file in small_gemma.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    weights = load_file(base / "model.safetensors")
    from transformers import AutoTokenizer

    (poisoned,) = AutoTokenizer.from_pretrained(base).encode("答", add_special_tokens=False)
    weights["model.embed_tokens.weight"][poisoned] = 3e38  # finite: a base that holds NaN is refused before
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    rows = [{"query": f"{n}+1", "response": str(n + 1) if n != 11 else "答"} for n in range(24)]
    (home / "one_bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--path_model_pretrain", base, "--data_path", home / "one_bad.jsonl", "--val_set_size", 0]
    code, output, errors = warm.run(["-m", *ACCELERATE, DDP_FILE, *TRAIN, *flags("nan", *more)], home)
    (line,) = error_lines(errors)
    assert code != 0 and "non-finite loss or gradient at step" in line and "one_bad.jsonl:12" in line
    assert not (home / "nan/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_wrong_data_is_said_once(home, flags, warm):
    code, _, errors = warm.run(["-m", *TORCHRUN, *TRAIN, *flags("wrong", "--data_path", home / "missing.jsonl")], home)
    (line,) = error_lines(errors)
    assert code != 0 and "missing.jsonl: 文件不存在 no such file" in line


ONE_FAILS = f"""
import sys
sys.path[0] = {str(ROOT)!r}
from common import distributed, errors, launch
from common.launch import rank
launch.GRACE = 2

class Plan:
    deepspeed = ""

def main():
    distributed.join(Plan)
    assert distributed.first(lambda: "told") == (None if rank() else "told")
    assert distributed.share(rank()) == 0 and distributed.gather(rank()) == [0, 1]
    assert distributed.largest(rank()) == 1
    assert distributed.in_turn(rank) == rank()
    print("spoken by", rank())
    if rank():
        raise errors.UserError("only here")
    distributed.wait()

errors.run_main(main)
"""


@pytest.mark.slow
def test_pain_21_an_error_of_one_process_is_said_and_ends_all(home, finish):
    (home / "one_fails.py").write_text(ONE_FAILS)
    code, output, errors = finish(TORCHRUN, [str(home / "one_fails.py")])
    assert code != 0 and error_lines(errors) == ["错误 error: only here"]
    assert output.count("spoken by") == 1 and "[rank0]" not in errors
