"""Training runs on a small random Gemma: what they leave, what stops them, how they resume."""

import functools
import http.server
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import OptimizerNames

from common.cli import parse
from common.config import PredictFlags, TrainFlags
from common.errors import UserError
from common.inference.tuned import trained_with
from common.knobs import OPTIMIZERS
from common.model import loading, loss, verify
from common.runs import manifest, run
from common.runs.adopted import find_manifest
from common.runs.checkpoints import last_whole_checkpoint
from common.runs.manifest import differing_parts
from common.training import batches, callbacks, guards, report, trainer, tuning
from common.training.arguments import arguments
from gemma_sft import prompt
from gemma_sft.ft_gemma import predict, train
from gemma_sft.ft_gemma.config import Config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    """60 small rows of several lengths."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"query": f"{n}+{n * 7 % 50}", "response": str(n + n * 7 % 50) * (1 + n % 4)} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command_line(small_gemma, rows_file, parent, name, *more):
    """The flags of a run into parent/name."""
    given = ["--path_model_pretrain", small_gemma, "--data_path", rows_file, "--model_save_dir", parent / name]
    given += ["--eval_rows", 0, "--sample_rows", 0, "--learning_rate", 0.01, "--cache_dir", parent / "cache"]
    return [str(flag) for flag in [*given, *more]]


@pytest.fixture
def flags(small_gemma, rows_file, tmp_path):
    """flags(name, *more): the command line of a run into tmp_path/name."""
    return functools.partial(command_line, small_gemma, rows_file, tmp_path)


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def same_adapter(one, other):
    first, second = adapter(one), adapter(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("tuning", ["lora", "freeze"])
def test_what_a_run_leaves_may_be_read_as_the_umask_says(flags, tmp_path, tuning):
    before = os.umask(0o027)
    try:
        train.main(flags("out", "--max_steps", 2, "--tuning", tuning))
    finally:
        os.umask(before)
    weights = sorted((tmp_path / "out").rglob("*.safetensors"))
    assert {file.parent.name for file in weights} == {"out", "checkpoint-2"}
    assert {oct(file.stat().st_mode & 0o777) for file in weights} == {oct(0o640)}


def test_a_run_leaves_every_file(flags, tmp_path, capsys):
    train.main(flags("out", "--max_steps", 6, "--save_steps", 3, "--eval_rows", 2, "--max_new_tokens", 4))
    folder = tmp_path / "out"
    files = "adapter_config.json adapter_model.safetensors tokenizer.json tokenizer_config.json chat_template.jinja "
    files += "run_manifest.json trainer_log.jsonl training_loss.png all_results.json rejected.jsonl README.md"
    assert [name for name in files.split() if not (folder / name).is_file()] == []
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 3, 5, 6]
    expected = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds"}
    assert all(record["memory_mib"] > 100 for record in log)
    assert all(expected <= record.keys() for record in log)
    assert log[-1]["eval_loss"] < log[1]["eval_loss"]
    results = json.loads((folder / "all_results.json").read_text())
    assert {"train_loss", "train_runtime", "tokens", "base", "tuned", "signature"} <= results.keys()
    assert results["tokens"] == log[-1]["tokens"]
    assert (folder / "training_loss.png").read_bytes()[:4] == b"\x89PNG"
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert len(file.keys()) == 2 * 3 * 2  # layers × (q, k, v) × (A, B)
    printed = capsys.readouterr().out
    for text in ("input_ids: [2, 5,", "labels: [-100,", "可训练参数 trainable params: 5,120 /", "计划 plan:"):
        assert text in printed


def test_validations_and_checkpoints_do_not_count_as_slow_training(tmp_path, monkeypatch):
    clock = iter([0, 10, 60, 70, 80])  # begin, line, validation done, checkpoint written, line
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(callbacks.curve, "draw", lambda folder: None)
    recorder, args = callbacks.Recorder(tmp_path), None
    state, control = TrainerState(max_steps=2, epoch=0.0), TrainerControl()
    recorder.on_train_begin(args, state, control)
    logged = {"loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0}
    recorder.on_log(args, state, control, logged | {"tokens": 100})
    recorder.on_evaluate(args, state, control, {"eval_token_loss": 1.0})
    recorder.on_save(args, state, control)
    state.global_step = 2
    recorder.on_log(args, state, control, logged | {"tokens": 200})
    recorder.close()
    assert [record["tokens_per_second"] for record in recorder.records] == [10, 10]
    assert [record["seconds"] for record in recorder.records] == [10, 80]
    found = recorder.summary()
    assert found["tokens_per_second"] == 10 and found["train_runtime"] == 80


def test_the_manifest_says_what_was_trained(flags, tmp_path, small_gemma, rows_file):
    train.main(flags("out", "--max_steps", 1))
    manifest = json.loads((tmp_path / "out/run_manifest.json").read_text())
    assert manifest["state"] == "finished"
    assert manifest["base"]["path"] == str(small_gemma) and len(manifest["base"]["sha256"]) == 64
    assert manifest["config"]["learning_rate"] == 0.01 and manifest["config"]["lora_r"] == 16
    assert manifest["template"]["text"].startswith("<bos><start_of_turn>user\n{system}\n\n{question 1}<end_of_turn>")
    assert manifest["stop_ids"] == [6, 1]
    assert manifest["data"][0] | {"path": str(rows_file), "rows": 60, "kept": 60} == manifest["data"][0]
    assert manifest["counts"] == {"train": 59, "validation": 1, "rejected": 0}
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(small_gemma)


PLAIN_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, ids = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    logits = model(input_ids=torch.tensor([list(map(int, ids.split(",")))])).logits
torch.save(logits, adapter + "/logits.pt")
"""


def test_plain_peft_gives_our_logits_in_another_process(flags, tmp_path, small_gemma):
    train.main(flags("out", "--max_steps", 3))
    cfg, _ = parse(Config, TrainFlags, flags("out"))
    answer = predict.load_answer(cfg)
    ids = [2, 5, 290, 291, 6, 264, 5, 280]
    command = [sys.executable, "-c", PLAIN_PEFT, small_gemma, tmp_path / "out", ",".join(map(str, ids))]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    with torch.no_grad():
        ours = answer.net(input_ids=torch.tensor([ids])).logits
        base = loading.load_base(small_gemma, "float32")(input_ids=torch.tensor([ids])).logits
    theirs = torch.load(tmp_path / "out/logits.pt", weights_only=True)
    assert (ours - theirs).abs().max() == 0
    assert (ours - base).abs().max() > 1e-4, "the adapter must do something"


@pytest.mark.parametrize("micro", [1, 8])
def test_accumulation_does_not_change_the_step(flags, tmp_path, rows_file, micro):
    """One optimizer step over the same 8 rows, 8×1 and 1×8, against 2×4."""
    steps = ["--data_path", f"{rows_file}#8", "--val_set_size", 0, "--batch_size", 8, "--max_steps", 1]
    train.main(flags("reference", *steps, "--lora_dropout", 0, "--micro_batch_size", 2))
    train.main(flags("other", *steps, "--lora_dropout", 0, "--micro_batch_size", micro))
    losses = [
        json.loads((tmp_path / name / "all_results.json").read_text())["train_loss"] for name in ("reference", "other")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    first, second = adapter(tmp_path / "reference"), adapter(tmp_path / "other")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-5)


def test_accumulation_is_clamped_to_the_epoch():
    cfg = Config(micro_batch_size=4, batch_size=128, epochs=3)
    assert trainer.make_plan(cfg, 10) == {
        "accumulation": 3,
        "steps_per_epoch": 1,
        "total_steps": 3,
        "warmup_steps": 0,
    }


@pytest.mark.parametrize("epochs, steps", [(0.5, 3), (1, 5), (1.3, 7), (0.01, 1)])
def test_a_part_of_an_epoch_is_rounded_up_to_a_step(epochs, steps):
    assert trainer.make_plan(Config(micro_batch_size=2, batch_size=2, epochs=epochs), 10)["total_steps"] == steps


def test_batches_are_of_like_length_and_repeat_by_seed_and_epoch():
    lengths = [(n * 37) % 100 + 1 for n in range(1003)]
    sampler = batches.LengthGroupedSampler(lengths, 4, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(1003)) and len(sampler.batches()[-1]) == 3
    assert first == list(batches.LengthGroupedSampler(lengths, 4, seed=1))
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert sampler.padding(4) < 0.05
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in sampler.batches()]
    assert sum(spread) / len(spread) < 5


def test_the_longest_row_comes_first():
    lengths = [*range(1, 50), 400, *range(1, 50)]
    sampler = batches.LengthGroupedSampler(lengths, 4, seed=1)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert sampler.batches()[0][0] == 49
        assert sorted(sampler) == list(range(len(lengths)))


def test_padding_is_told_by_length_not_by_id():
    rows = [
        {"input_ids": [2, 0, 9], "labels": [-100, 0, 9], "where": "f:1"},
        {"input_ids": [2], "labels": [-100], "where": "f:2"},
    ]
    batch = batches.collate(rows, pad_id=0)
    assert batch["input_ids"].tolist() == [[2, 0, 9], [2, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 0, 9], [-100, -100, -100]]


def test_a_loss_that_is_not_finite_stops_the_run(flags, tmp_path):
    with pytest.raises(UserError) as stopped:
        train.main(flags("out", "--learning_rate", 1e30, "--max_steps", 8, "--save_steps", 1))
    message = str(stopped.value)
    assert "non-finite loss or gradient at step 2" in message and "rows.jsonl:" in message
    assert "last good checkpoint" in message and "checkpoint-1" in message
    assert (tmp_path / "out/checkpoint-1/whole.json").is_file()
    assert not (tmp_path / "out/adapter_model.safetensors").exists()


def test_an_adapter_cut_off_from_the_loss_is_caught(flags, monkeypatch):
    """The old remedy `loss.requires_grad_(True)` trains nothing: the loss stays where it is. Here it ends the run."""
    whole = loss.token_losses

    def cut_off(*args):
        return whole(*args).detach().requires_grad_(True)

    monkeypatch.setattr(loss, "token_losses", cut_off)
    with pytest.raises(UserError, match="12 个可训练参数没有梯度|6 个可训练参数没有梯度"):
        train.main(flags("out", "--max_steps", 2))


def test_gradients_are_proven_with_checkpointing_too(flags, tmp_path):
    train.main(flags("plain", "--max_steps", 2))
    train.main(flags("recomputed", "--max_steps", 2, "--gradient_checkpointing"))
    assert same_adapter(tmp_path / "plain", tmp_path / "recomputed")


def tamper(folder, change):
    tensors = adapter(folder)
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_an_adapter_that_does_not_fit_is_refused(flags, tmp_path):
    train.main(flags("out", "--max_steps", 1))
    cfg, _ = parse(Config, TrainFlags, flags("out"))
    tamper(tmp_path / "out", lambda tensors: tensors.pop(next(iter(tensors))))
    with pytest.raises(UserError, match="does not fit: 1 缺少 missing"):
        predict.load_answer(cfg)


def test_an_adapter_that_does_nothing_is_refused(small_gemma, tmp_path):
    net = tuning.make_trainable(loading.load_base(small_gemma, "float32"), Config())
    net.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lora_B are zero"):
        verify.verify_adapter(net, tmp_path)


def test_what_does_not_belong_to_the_run_is_refused(flags, tmp_path, small_gemma):
    copy = tmp_path / "base"
    copy.mkdir()
    for file in small_gemma.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    train.main(flags("out", "--path_model_pretrain", copy, "--max_steps", 1))
    cfg, _ = parse(Config, TrainFlags, flags("out"))
    assert predict.load_answer(cfg).net.peft_config, "the same weights in another folder are the same base"
    with pytest.raises(UserError, match="--prompt_style plain"):
        predict.load_answer(parse(Config, None, ["--model_save_dir", str(tmp_path / "out"), "--prompt_style", "plain"]))
    mine = parse(Config, None, ["--model_save_dir", str(tmp_path / "out")])
    assert predict.load_answer(mine).net.peft_config
    for one, rest in (("qlora", "--quantization_bit 4.8 .*; else leave the flag out"), ("full", "leave the flag")):
        asked, _ = parse(Config, PredictFlags, ["--model_save_dir", str(tmp_path / "out"), "--tuning", one])
        with pytest.raises(UserError, match=f"--tuning {one}: .* was trained with lora; {rest}"):
            predict.load_answer(asked)
    asked = [*("--model_save_dir", str(tmp_path / "out")), *("--tuning", "qlora", "--quantization_bit", "8")]
    assert trained_with(parse(Config, PredictFlags, asked)[0], find_manifest(tmp_path / "out"), False).bits == 8
    weights = load_file(copy / "model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in weights.items()}, copy / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(
        UserError, match="基座模型 base model .* trained '[0-9a-f]+'…?, now '[0-9a-f]+'…?; give the base"
    ):
        predict.load_answer(mine)
    given = [*flags("out"), "--path_model_pretrain", str(copy)]
    again = tmp_path / "again"
    train.main(flags("again", "--path_model_pretrain", small_gemma, "--max_steps", 1))
    with pytest.raises(UserError, match=f"--path_model_pretrain {copy}: .* was trained with {small_gemma}"):
        predict.load_answer(parse(Config, TrainFlags, [*given, "--model_save_dir", str(again)])[0])


def test_another_tokenizer_or_template_is_refused_with_what_differs(flags, tmp_path, monkeypatch, tokenizer):
    train.main(flags("out", "--max_steps", 1))
    cfg, _ = parse(Config, TrainFlags, flags("out"))
    whole = prompt.render

    def one_newline_less(tokenizer, turns, style):
        pieces = whole(tokenizer, turns, style)
        return [piece._replace(ids=piece.ids[:-1]) if piece.ids[-1] == 264 else piece for piece in pieces]

    with monkeypatch.context() as patched:
        patched.setattr(prompt, "render", one_newline_less)
        with pytest.raises(UserError) as refused:
            predict.load_answer(cfg)
    message = str(refused.value)
    assert "提示模板 prompt template" in message and "restore prompt.py" in message and len(message) < 600
    assert r"trained …'of_turn>user\n{system}" in message and "now …'of_turn>user{system}" in message
    with monkeypatch.context() as patched:
        patched.setattr(manifest.cache, "tokenizer_hash", lambda tokenizer: "f" * 64)
        with pytest.raises(UserError, match="分词器 tokenizer .*, now 'f+'…; restore the base's tokenizer"):
            predict.load_answer(cfg)


@pytest.mark.parametrize(
    ("trained", "now", "shown"),
    [
        ("a" * 40 + "\nb", "a" * 40 + "b", [r"…'aaaaaaaaaaaa\nb'", "…'aaaaaaaaaaaab'"]),
        ("ab", "ac" + "d" * 100, ["'ab'", f"'ac{'d' * 58}'…"]),
        ("x", "", ["'x'", "''"]),
        ("aba", "aa", ["'aba'", "'aa'"]),
    ],
)
def test_differing_parts_are_short(trained, now, shown):
    assert differing_parts(trained, now) == shown


def test_a_finished_run_is_kept_when_trained_again(flags, tmp_path):
    train.main(flags("out", "--max_steps", 1))
    first = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    train.main(flags("out", "--max_steps", 2))
    assert (tmp_path / "out.1/adapter_model.safetensors").read_bytes() == first
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() != first


def test_one_folder_one_run(flags, tmp_path):
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out/.lock"), pytest.raises(UserError, match="another run is writing here"):
        train.main(flags("out", "--max_steps", 1))


def test_relative_data_paths_are_relative_to_the_caller(forked, small_gemma, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"query": "1", "response": "2"}\n{"query": "1", "answer_": "2"}\n' * 4)
    more = ["--max_steps", 1, "--eval_rows", 0, "--path_model_pretrain", small_gemma]
    done = forked("train.py", "--data_path", "mine.jsonl#4", "--model_save_dir", "out", *more)
    assert done.returncode == 0, done.stderr
    rejected = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [row["where"] for row in rejected] == [f"{tmp_path}/mine.jsonl:{line}" for line in (2, 4, 6, 8)]
    assert "unknown keys: answer_+query" in rejected[0]["reason"] and rejected[0]["row"] == {
        "query": "1",
        "answer_": "2",
    }


def test_a_trained_model_is_left_as_it_was_made(flags, monkeypatch):
    nets = []
    monkeypatch.setattr(report, "leave", lambda work, net, *rest: nets.append(net))
    train.main(flags("out", "--max_steps", 2, "--save_steps", 1))
    (net,) = nets
    assert not [name for name, module in net.named_modules() if "forward" in vars(module)]
    assert not {"start", "pissa_start", "save_pretrained"} & vars(net).keys()


def test_print_targets(flags, capsys):
    train.main(flags("out", "--print_targets"))
    assert "q_proj           [32, 32]  × 2" in capsys.readouterr().out


def results_of(folder):
    return json.loads((folder / "all_results.json").read_text())


@pytest.fixture
def validations(monkeypatch):
    """validations(*losses): what the validations of a run find, in order."""

    def script(*losses):
        left = iter(losses)
        monkeypatch.setattr(trainer, "validation_loss", lambda prediction: {"token_loss": next(left)})

    return script


EVERY_STEP = ["--save_steps", 1, "--logging_steps", 1, "--save_total_limit", 2]


def checkpoints(folder):
    return sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*"))


def test_early_stopping_ends_the_run_and_saves_the_best(flags, tmp_path, validations, capsys):
    validations(5.0, 3.0, 4.0, 4.5, 3.5)
    train.main(flags("out", "--max_steps", 12, *EVERY_STEP, "--early_stopping_patience", 3))
    folder, results = tmp_path / "out", results_of(tmp_path / "out")
    assert results["steps"] == 5 and checkpoints(folder) == [2, 5]
    assert (results["best_step"], results["best_eval_loss"], results["adapter_of_step"]) == (2, 3.0, 2)
    assert "early stop: no new best in 3 validations; best 3.0000, now 3.5000" in capsys.readouterr().out
    assert same_adapter(folder, folder / "checkpoint-2") and not same_adapter(folder, folder / "checkpoint-5")


def test_early_stopping_counts_on_after_a_resume(flags, tmp_path, validations, monkeypatch):
    more = ["--max_steps", 12, *EVERY_STEP, "--early_stopping_patience", 3]
    validations(5.0, 3.0, 4.0, float("nan"))
    with monkeypatch.context() as dying:
        dying.setattr(callbacks.Recorder, "on_save", lambda self, args, state, *rest, **kwargs: fail_at(state, 4))
        with pytest.raises(RuntimeError, match="died"):
            train.main(flags("out", *more))
    validations(4.0, 4.5, 5.5)
    train.main(flags("out", *more))
    results = results_of(tmp_path / "out")
    assert results["best_step"] == 2 == results["adapter_of_step"] and results["steps"] == 5


def test_early_stopping_says_so_where_the_best_checkpoint_is_gone(flags, tmp_path, validations, capsys):
    """The last step was saved, and called the best one."""
    more = [*EVERY_STEP, "--early_stopping_patience", 2]
    validations(5.0, 3.0, 4.0)
    train.main(flags("out", *more, "--max_steps", 3))
    kept = shutil.copytree(tmp_path / "out" / "checkpoint-3", tmp_path / "kept" / "checkpoint-3")
    shutil.rmtree(tmp_path / "out")
    validations(4.5)
    train.main(flags("again", *more, "--max_steps", 6, "--resume", kept))
    assert "of step 2, is gone" in capsys.readouterr().out
    results = results_of(tmp_path / "again")
    assert results["adapter_of_step"] == results["best_step"] == 4 and results["best_eval_loss"] == 4.5
    assert same_adapter(tmp_path / "again", tmp_path / "again" / "checkpoint-4")


def fail_at(state, step):
    if state.global_step == step:
        raise RuntimeError("died")


def test_without_early_stopping_the_last_is_saved_and_the_best_kept(flags, tmp_path, validations):
    validations(5.0, 3.0, 4.0, 4.5, 3.5, 3.6)
    train.main(flags("out", "--max_steps", 6, *EVERY_STEP))
    folder, results = tmp_path / "out", results_of(tmp_path / "out")
    assert (results["best_step"], results["adapter_of_step"], results["steps"]) == (2, 6, 6)
    assert checkpoints(folder) == [2, 6], "older than the limit, but the best"
    assert same_adapter(folder, folder / "checkpoint-6")


def test_early_stopping_needs_validation_rows(flags):
    with pytest.raises(UserError, match="--early_stopping_patience .* --val_set_size"):
        train.main(flags("out", "--val_set_size", 0, "--early_stopping_patience", 1))


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([4.0] * 30, 1),
        ([4.0] * 10 + [3.0] * 10 + [2.0] * 20, 0),
        ([4.0] * 10 + [2.0] * 10 + [2.5] * 30, 1),
        ([4.0] * 19, 0),
    ],
)
def test_a_loss_that_does_not_fall_is_named_once(capsys, losses, told):
    watch, state = guards.StallWatch(), TrainerState(is_world_process_zero=True)
    for value in losses:
        watch.on_log(None, state, None, {"loss": value, "learning_rate": 1e-9})
    out = capsys.readouterr().out
    assert out.count("the loss is not falling") == told
    assert not told or "--learning_rate (now 1.0e-09)" in out


def test_a_run_that_learns_nothing_says_so(flags, capsys):
    train.main(flags("out", "--max_steps", 22, "--logging_steps", 1, "--learning_rate", 1e-12))
    assert capsys.readouterr().out.count("第 20 步，损失没有下降") == 1


def test_the_default_optimizer_is_transformers_own(tmp_path):
    plan = {"accumulation": 1, "warmup_steps": 0, "total_steps": 1, "steps_per_epoch": 1}
    args = arguments(Config(model_save_dir=str(tmp_path)), plan, False, False)
    assert args.optim == TrainingArguments(str(tmp_path), use_cpu=True).optim
    assert set(OPTIMIZERS) <= {name.value for name in OptimizerNames}


def test_an_optimizer_without_its_package_is_refused_before_anything(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--optim grokadamw: 没有安装 needs grokadamw: pip install grokadamw"):
        train.main(flags("out", "--optim", "grokadamw"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("optim", "kept"), [("sgd", set()), ("lion_8bit", {"step", "__bnb_optimizer_quant_state__"})])
def test_another_optimizer_trains(flags, tmp_path, optim, kept):
    if optim == "lion_8bit":
        pytest.importorskip("bitsandbytes")
    train.main(flags("out", "--max_steps", 2, "--optim", optim, "--lora_r", 128))
    state = torch.load(tmp_path / "out/checkpoint-2/optimizer.pt", weights_only=False)["state"]
    assert set().union(*state.values()) - {"momentum_buffer"} == kept


def test_a_run_from_before_there_was_a_choice_resumes(flags, tmp_path, capsys):
    train.main(flags("out", "--max_steps", 2))
    file = tmp_path / "out/run_manifest.json"
    old = json.loads(file.read_text(encoding="utf-8")) | {"state": "training"}
    assert old["config"].pop("optim") == "adamw_torch_fused"
    file.write_text(json.dumps(old), encoding="utf-8")
    with pytest.raises(UserError, match="optim: adamw_torch_fused → sgd"):
        train.main(flags("out", "--max_steps", 2, "--optim", "sgd"))
    train.main(flags("out", "--max_steps", 2))
    assert f"resuming from {tmp_path}/out/checkpoint-2" in capsys.readouterr().out


def test_reports_go_to_tensorboard(flags, tmp_path):
    pytest.importorskip("tensorboard")
    train.main(flags("out", "--max_steps", 2, "--report_to", "tensorboard"))
    assert list((tmp_path / "out/runs").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("more", [[], ["--tuning", "qlora", "--quantization_bit", 8]])
def test_libraries_say_nothing_that_nobody_can_mend(flags, forked, tmp_path, more):
    if more:
        pytest.importorskip("bitsandbytes")
    done = forked("train.py", *flags("out", "--max_steps", 2, "--gradient_checkpointing", "true", *more))
    assert done.returncode == 0, done.stderr
    bars = ("Loading weights", "Writing model", "编码 tokenising", "训练 training")
    told = [line.strip() for line in re.split(r"[\r\n]", done.stderr)]
    assert [line for line in told if line and not line.startswith(bars)] == []


class Settings(dict):
    def update(self, values, **options):
        super().update(values)


class Tracker(types.ModuleType):
    """In the place of swanlab and of trackio: keeps what transformers' callback logs there."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__, self.logged, self.config = ModuleSpec(name, None), [], Settings()
        self.context_vars = types.SimpleNamespace(current_space_id=types.SimpleNamespace(get=lambda: None))

    def init(self, **options):
        self.options = options

    def get_run(self):
        return None

    def log(self, values, **more):
        self.logged.append(values)

    def finish(self):
        self.options = None


@pytest.mark.parametrize("name", ["swanlab", "trackio"])
def test_reports_go_to_other_trackers(flags, monkeypatch, name):
    tracker = Tracker(name)
    monkeypatch.setitem(sys.modules, name, tracker)
    train.main(flags("out", "--max_steps", 2, "--logging_steps", 1, "--report_to", name))
    assert sum("train/loss" in values for values in tracker.logged) == 2
    assert tracker.config["learning_rate"] == 0.01


@pytest.mark.parametrize("package", ["wandb", "swanlab", "trackio"])
def test_a_report_without_its_package_is_refused_before_anything(flags, tmp_path, capsys, monkeypatch, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        train.main(flags("out", "--report_to", package))
    told = f"--report_to {package}: 没有安装 the package is not installed; remedy: pip install {package}"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


LONG = ["--max_steps", 60, "--save_steps", 20, "--logging_steps", 1, "--lora_dropout", 0.1]
SCRIPT = ROOT / "gemma_sft/ft_gemma/train.py"


def start(flags, environment):
    command = [sys.executable, SCRIPT, *flags]
    return subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


@pytest.fixture(scope="module")
def uninterrupted(small_gemma, rows_file, tmp_path_factory, warm):
    parent = tmp_path_factory.mktemp("uninterrupted")
    status, _, errors = warm.run([SCRIPT, *command_line(small_gemma, rows_file, parent, "whole", *LONG)], parent)
    assert status == 0, errors
    return parent / "whole"


def steps_logged(folder):
    log = folder / "trainer_log.jsonl"
    return [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_stopped_run_resumes_bit_for_bit(flags, tmp_path, environment, warm, uninterrupted, number):
    folder = tmp_path / "stopped"
    process = start(flags("stopped", *LONG), environment)
    wait_for(lambda: len(steps_logged(folder)) > 22, process)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert last_whole_checkpoint(folder) is not None
    else:
        assert process.returncode == 128 + number and "checkpoint saved" in errors
        assert len(steps_logged(folder)) < 60
    assert not (folder / "adapter_model.safetensors").exists()
    status, output, errors = warm.run([SCRIPT, *flags("stopped", *LONG)], tmp_path)
    assert status == 0, errors
    assert "从检查点继续 resuming from" in output
    assert same_adapter(folder, uninterrupted)
    assert steps_logged(folder) == list(range(1, 61))


def test_a_checkpoint_cut_off_while_written_is_not_used(flags, tmp_path):
    train.main(flags("out", "--max_steps", 4, "--save_steps", 2))
    folder = tmp_path / "out"
    with (folder / "checkpoint-4/adapter_model.safetensors").open("r+b") as file:
        file.truncate(100)
    assert last_whole_checkpoint(folder).name == "checkpoint-2"
    (folder / "checkpoint-2/whole.json").unlink()
    assert last_whole_checkpoint(folder) is None


def test_resume_refuses_changed_options(flags, tmp_path):
    with pytest.raises(UserError, match="non-finite"):
        train.main(flags("out", "--learning_rate", 1e30, "--max_steps", 4, "--save_steps", 1))
    with pytest.raises(UserError, match=r"learning_rate: 1e\+30 → 0.01"):
        train.main(flags("out", "--max_steps", 4, "--save_steps", 1))
    with pytest.raises(UserError, match=r"lora_r: 16 → 8.*--resume never") as refused:
        train.main(flags("out", "--learning_rate", 1e30, "--max_steps", 4, "--lora_r", 8, "--resume_anyway"))
    assert "--resume_anyway" not in str(refused.value), "weights of another rank cannot be loaded"
    train.main(flags("out", "--max_steps", 4, "--resume", "never"))
    assert (tmp_path / "out.1/checkpoint-1").is_dir() and (tmp_path / "out/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("patience", [0, 2], ids=["last step", "early stop"])
def test_a_run_that_died_after_its_last_step_makes_no_other(flags, tmp_path, monkeypatch, validations, patience):
    more = ["--lr_scheduler_type", "constant", "--max_steps", 6 if patience else 3, *EVERY_STEP]
    more += ["--early_stopping_patience", patience]
    validations(3.0, 4.0, 5.0)
    train.main(flags("whole", *more))
    validations(3.0, 4.0, 5.0)
    with monkeypatch.context() as dying:
        dying.setattr(run, "save_tuned", lambda *args: fail_at(TrainerState(global_step=1), 1))
        with pytest.raises(RuntimeError, match="died"):
            train.main(flags("out", *more))
    validations()
    train.main(flags("out", *more))
    assert results_of(tmp_path / "out")["steps"] == 3 == len(steps_logged(tmp_path / "out"))
    assert results_of(tmp_path / "out")["adapter_of_step"] == (1 if patience else 3)
    assert same_adapter(tmp_path / "out", tmp_path / "whole")


def test_resume_anyway_goes_on_with_changed_data_and_options(flags, tmp_path, rows_file, capsys):
    more = ["--save_steps", 1, "--learning_rate", 1e30]
    with pytest.raises(UserError, match="non-finite loss or gradient at step 2"):
        train.main(flags("out", "--max_steps", 4, *more))
    other = tmp_path / "other.jsonl"
    other.write_text(rows_file.read_text() + '{"query": "1", "response": "2"}\n')
    changed = ["--max_steps", 3, "--data_path", other, "--learning_rate", 1e-3]
    told = r"data 0: \w+\.\w+ \w{12} → other\.jsonl \w{12}; .*learning_rate: 1e.30 → 0.001; max_steps: 4 → 3"
    with pytest.raises(UserError, match=told + ".*--resume_anyway"):
        train.main(flags("out", *changed))
    with pytest.raises(UserError, match="non-finite"):  # the optimizer's state is the earlier run's
        train.main(flags("out", *changed, "--resume_anyway"))
    assert "照样继续 resuming although data or options differ" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out/run_manifest.json").read_text())
    assert manifest["resumed_anyway"]["max_steps"] == "4 → 3" and "data 0" in manifest["resumed_anyway"]


def test_going_back_to_a_checkpoint_keeps_what_came_after_it_aside(flags, tmp_path, monkeypatch):
    more = ["--max_steps", 6, "--save_steps", 2, "--logging_steps", 1]
    train.main(flags("out", *more))
    changed = [*more, "--learning_rate", 0.002, "--resume_anyway"]
    with monkeypatch.context() as dying:
        dying.setattr(callbacks.Recorder, "on_save", lambda self, args, state, *rest, **kwargs: fail_at(state, 4))
        with pytest.raises(RuntimeError, match="died"):
            train.main(flags("out", *changed, "--resume", tmp_path / "out/checkpoint-2"))
    assert checkpoints(tmp_path / "out") == [2, 4] and checkpoints(tmp_path / "out.1") == [4, 6]
    assert not same_adapter(tmp_path / "out/checkpoint-4", tmp_path / "out.1/checkpoint-4")
    assert find_manifest(tmp_path / "out.1")["state"] == "finished" and len(steps_logged(tmp_path / "out.1")) == 6
    assert same_adapter(tmp_path / "out.1", tmp_path / "out.1/checkpoint-6")
    train.main(flags("out", *changed))
    assert steps_logged(tmp_path / "out") == [1, 2, 3, 4, 5, 6]
    assert not same_adapter(tmp_path / "out", tmp_path / "out.1")


def test_a_checkpoint_of_another_folder_brings_its_log(flags, tmp_path):
    more = ["--max_steps", 4, "--save_steps", 2, "--logging_steps", 1]
    train.main(flags("first", *more))
    train.main(flags("out", "--max_steps", 1))
    train.main(flags("out", *more, "--resume", tmp_path / "first/checkpoint-2"))
    assert find_manifest(tmp_path / "out.1")["state"] == "finished"
    assert steps_logged(tmp_path / "out") == [1, 2, 3, 4]
    for name in ("train_loss", "tokens", "steps"):
        assert results_of(tmp_path / "out")[name] == results_of(tmp_path / "first")[name]
    assert same_adapter(tmp_path / "out", tmp_path / "first")


@pytest.mark.parametrize("rows", ["false", "true"], ids=["one rate", "two rates"])
def test_a_rate_changed_at_a_resume_is_taken(flags, tmp_path, rows):
    more = ["--max_steps", 4, "--save_steps", 2, "--logging_steps", 1, "--train_template_tokens", rows]
    train.main(flags("out", *more))
    before = rates_logged(tmp_path / "out")
    again = ["--resume", tmp_path / "out/checkpoint-2", "--learning_rate", 0.002, "--weight_decay", 0.5]
    train.main(flags("out", *more, *again, "--resume_anyway"))
    assert rates_logged(tmp_path / "out") == pytest.approx([*before[:2], before[2] / 5, before[3] / 5])
    state = torch.load(tmp_path / "out/checkpoint-4/optimizer.pt")
    decays = {group["weight_decay"] for group in state["param_groups"] if group["params"]}
    assert decays == ({0.5, 0.0} if rows == "true" else {0.5})


def test_what_changed_at_a_resume_is_known_after_the_next(flags, tmp_path, monkeypatch):
    more = ["--max_steps", 4, "--save_steps", 1]
    for step, rate in ((2, 0.02), (3, 0.03), (4, 0.04)):
        with monkeypatch.context() as dying:
            dying.setattr(callbacks.Recorder, "on_save", lambda self, args, state, *a, s=step, **k: fail_at(state, s))
            with pytest.raises(RuntimeError, match="died"):
                train.main(flags("out", *more, "--learning_rate", rate, "--resume_anyway"))
    train.main(flags("out", *more, "--learning_rate", 0.04))
    told = find_manifest(tmp_path / "out")["resumed_anyway"]
    assert told == {"learning_rate": "0.02 → 0.03; 0.03 → 0.04"}


def rates_logged(folder):
    return [json.loads(line)["learning_rate"] for line in (folder / "trainer_log.jsonl").read_text().splitlines()]


FAKE_MODELSCOPE = """
def snapshot_download(model_id):
    if model_id != "AI-ModelScope/small":
        raise RuntimeError(f"{model_id} does not exist")
    return FOLDER
"""


def test_a_modelscope_id_loads_through_its_package(flags, tmp_path, small_gemma, monkeypatch):
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    monkeypatch.delitem(sys.modules, "modelscope", raising=False)
    given = ["--path_model_pretrain", "AI-ModelScope/small", "--max_steps", 1]
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "modelscope", None)
        with pytest.raises(UserError, match="AI-ModelScope/small: USE_MODELSCOPE_HUB .*pip install modelscope"):
            train.main(flags("out", *given))
    (tmp_path / "modelscope.py").write_text(FAKE_MODELSCOPE.replace("FOLDER", repr(str(small_gemma))))
    monkeypatch.syspath_prepend(tmp_path)
    train.main(flags("out", *given))
    assert predict.load_answer(parse(Config, TrainFlags, flags("out", *given))[0]).net.peft_config
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(small_gemma), "a folder that plain transformers loads"
    with pytest.raises(UserError, match="AI-ModelScope/none: .* cannot be downloaded .*: AI-ModelScope/none does not"):
        train.main(flags("out", "--path_model_pretrain", "AI-ModelScope/none"))
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "0")
    with pytest.raises(UserError, match="AI-ModelScope/small: 无法加载"):
        train.main(flags("out", *given))


def test_hf_endpoint_is_asked(environment, tmp_path):
    """A hub id goes to the server HF_ENDPOINT names."""
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    home = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    try:
        command = [sys.executable, ROOT / "gemma_sft/ft_gemma/train.py", "--path_model_pretrain", "some/model"]
        done = subprocess.run(
            list(map(str, command)), env=environment | home, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
    finally:
        hub.shutdown()
        hub.server_close()
    assert done.returncode == 1 and "some/model: 无法加载分词器 tokenizer cannot be loaded" in done.stderr
    assert any(path.startswith("/some/model/resolve/main/") for path in asked), asked
