"""kill -9 at random moments, damaged checkpoints, a full disk: a later run never takes what is broken for good.

FAULT_TRIES=20 kills twenty times at each of the three kinds of moments; the usual number is smaller.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from common.cli import parse
from common.config import TrainFlags
from common.errors import UserError
from common.runs import checkpoints, manifest
from gemma_sft.ft_gemma import predict, train
from gemma_sft.ft_gemma.config import Config

ROOT = Path(__file__).resolve().parents[1]
TRIES = int(os.environ.get("FAULT_TRIES", "2"))
# imports once, then forks a process for each run: it trains with real flags and is killed for real
SERVER = """
import json, os, signal, sys, time, traceback
sys.path.insert(0, sys.argv[1])
import matplotlib.pyplot, torch
from common.runs import run
from common.training import report, trainer
from gemma_sft.ft_gemma import train

def announced(holder, name, pipe, nth):
    whole, calls = getattr(holder, name), []
    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            os.write(pipe, b"x")
        return whole(*args, **kwargs)
    setattr(holder, name, wrapper)

MOMENTS = {"training": (trainer.SupervisedTrainer, "training_step"),
           "checkpoint": (trainer.SupervisedTrainer, "_save_checkpoint"), "final": (run, "save_tuned")}

def child(job, pipe):
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    if job["moment"]:
        announced(*MOMENTS[job["moment"]], pipe, job["nth"])
    try:
        train.main(job["flags"])
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)

for line in sys.stdin:
    job = json.loads(line)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(job, writer)
    os.close(writer)
    if job["moment"]:
        os.read(reader, 1)
        time.sleep(job["delay"])
        os.kill(pid, signal.SIGKILL)
    os.close(reader)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
STEPS = [
    "--lr_scheduler_type",
    "constant",
    "--max_steps",
    8,
    "--save_steps",
    2,
    "--logging_steps",
    1,
    "--save_total_limit",
    2,
    "--lora_dropout",
    0.1,
]


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"query": f"{n}+1", "response": str(n + 1)}) + "\n" for n in range(40)))
    return path


@pytest.fixture(scope="module")
def flags(small_gemma, rows_file, tmp_path_factory):
    """flags(folder, *more): the command line of a short run into it."""
    cache = tmp_path_factory.mktemp("cache")

    def make(folder, *more):
        given = ["--path_model_pretrain", small_gemma, "--data_path", rows_file, "--cache_dir", cache, "--eval_rows", 0]
        given += ["--sample_rows", 0]
        return [str(flag) for flag in [*given, *STEPS, "--model_save_dir", folder, *more]]

    return make


@pytest.fixture(scope="module")
def server(environment):
    """server(flags, moment, nth, delay, log): the exit code of a run, killed `delay` seconds after the nth moment."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(ROOT)],
        env=environment | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def train_in_a_process(flags, log, moment=None, nth=1, delay=0.0):
        job = {"flags": flags, "log": str(log), "moment": moment, "nth": nth, "delay": delay}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield train_in_a_process
    process.stdin.close()
    process.wait(60)
    process.stdout.close()


@pytest.fixture(scope="module")
def reference(server, flags, tmp_path_factory):
    """The adapter of a run nobody disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    assert server(flags(folder / "out"), folder / "log") == 0, (folder / "log").read_text()
    return (folder / "out/adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(TRIES))
@pytest.mark.parametrize(
    ("moment", "count", "longest"), [("training", 24, 0.05), ("checkpoint", 4, 0.1), ("final", 1, 0.6)]
)
def test_a_killed_run_is_never_taken_for_good(server, flags, reference, tmp_path, moment, count, longest, number):
    draw = random.Random(f"{moment} {number}")
    folder, log = tmp_path / "out", tmp_path / "log"
    code = server(flags(folder), log, moment, draw.randint(1, count), draw.uniform(0, longest))
    assert code in (0, -9), log.read_text()
    cfg, _ = parse(Config, TrainFlags, flags(folder))
    if manifest.read_manifest(folder)["state"] == "finished":
        assert predict.load_answer(cfg).net.peft_config
    else:
        with pytest.raises(UserError, match="the run is not finished"):
            predict.load_answer(cfg)
        assert server(flags(folder), log) == 0, log.read_text()
    assert (folder / "adapter_model.safetensors").read_bytes() == reference
    steps = [json.loads(line)["step"] for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9)), "no step is lost or made twice"
    assert list(folder.glob("*.part")) == []


@pytest.mark.slow
def test_a_run_killed_while_moved_aside_leaves_nothing_to_resume(server, flags, reference, tmp_path):
    folder = tmp_path / "out"
    train.main(flags(folder, "--seed", 7))
    (folder / "run_manifest.json").unlink()  # its checkpoints are still here
    train.main(flags(folder))
    assert (folder / "adapter_model.safetensors").read_bytes() == reference
    assert (tmp_path / "out.1/checkpoint-8").is_dir()


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_found_and_the_one_before_it_used(trained, tmp_path, damage, name, capsys):
    folder = shutil.copytree(trained, tmp_path / "out")
    damage(folder / "checkpoint-8" / name)
    assert checkpoints.last_whole_checkpoint(folder).name == "checkpoint-6"
    assert "removing a checkpoint that was cut off or damaged" in capsys.readouterr().out
    assert not (folder / "checkpoint-8").exists()


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "out"
    train.main(flags(folder))
    assert checkpoints.last_whole_checkpoint(folder).name == "checkpoint-8"
    return folder


FULL = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from common.errors import run_main
from common.runs import checkpoints, run
from gemma_sft.ft_gemma import train
holder, name = {"checkpoint": (checkpoints, "mark_whole"), "final": (run, "save_tuned")}[sys.argv[2]]
limit = 20000  # bytes
whole = getattr(holder, name)

def then_full(*args):
    if name == "mark_whole":
        whole(*args)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if name == "save_tuned":
        whole(*args)

setattr(holder, name, then_full)
run_main(lambda: train.main(sys.argv[3:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "last"), [("checkpoint", "checkpoint-2"), ("final", "checkpoint-8")])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    flags, environment, tmp_path, reference, server, moment, last
):
    folder = tmp_path / "out"
    command = [sys.executable, "-c", FULL, str(ROOT), moment, *flags(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("错误 error:")]
    assert f"{folder}: 写不下了" in line and f"last good checkpoint: {folder}/{last};" in line
    assert checkpoints.last_whole_checkpoint(folder).name == last and not (folder / "adapter.part").exists()
    assert server(flags(folder), tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert (folder / "adapter_model.safetensors").read_bytes() == reference
    assert load_file(folder / "adapter_model.safetensors")


def test_a_full_cache_is_one_line(tmp_path, flags, environment):
    script = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from common.errors import run_main
from gemma_sft.ft_gemma import train
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
run_main(lambda: train.main(sys.argv[2:]))
"""
    command = [
        sys.executable,
        "-c",
        script,
        str(ROOT),
        *flags(tmp_path / "out"),
        "--cache_dir",
        str(tmp_path / "cache"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "磁盘已满 the disk is full" in done.stderr


@pytest.mark.parametrize(
    "work, found", [("torch.empty(1 << 50)", "tried to allocate"), ("bytearray(1 << 60)", "(MemoryError)")]
)
def test_too_little_memory_is_one_line(environment, work, found):
    script = f"""
import sys
sys.path.insert(0, sys.argv[1])
import torch
from common.errors import run_main
run_main(lambda: {work})
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("错误 error:")]
    assert "out of memory" in line and found in line and "--micro_batch_size" in line
