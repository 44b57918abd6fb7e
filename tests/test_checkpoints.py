"""Any checkpoint of a run answers, is scored, served and exported; a run goes on from an adapter on other data."""

import json
import re
import shutil

import pytest
import torch
from runs import QUESTION, STEPS
from safetensors.torch import load_file, save_file

from common.config import EvaluationFlags, ExportFlags, PredictFlags, ServeFlags, TrainFlags
from common.conversation.turns import Turn
from common.data import dataset
from common.errors import UserError, run_main
from common.export.folder import new_folder
from common.model import adapter, loading, loss
from common.runs import chosen, lineage, manifest, run
from common.serving import adapters
from common.training import batches, tuning


@pytest.fixture(scope="module")
def finished(family):
    """A run of four steps with a checkpoint each, whose second validation loss was made the lowest."""
    folder = family.train("finished", *STEPS, "--val_set_size", 4)
    set_losses(folder, {1: 3.0, 2: 1.25, 3: 2.0, 4: 1.5})
    return folder


@pytest.fixture(scope="module")
def stopped(family):
    """A run that was killed once its checkpoint of step 2 was there."""
    return family.stop("stopped", 2, *STEPS, "--val_set_size", 0)


@pytest.fixture
def line_of(capfd):
    """line_of(main, *flags): the one line of the error it ends with."""

    def run_it(main, *flags):
        with pytest.raises(SystemExit) as ended:
            run_main(lambda: main([str(flag) for flag in flags]))
        told = capfd.readouterr().err
        errors = [line for line in told.splitlines() if line.startswith("错误 error: ")]
        assert ended.value.code == 1 and len(errors) == 1 and "Traceback" not in told, told
        return errors[0]

    return run_it


def set_losses(folder, losses):
    """Change a run's log so that its validation losses are {step: loss}."""
    log = folder / "trainer_log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    for record in records:
        record.pop("eval_loss", None)
        record |= {"eval_loss": losses[record["step"]]} if record["step"] in losses else {}
    log.write_text("".join(json.dumps(record) + "\n" for record in records))


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- --checkpoint


def test_each_name_answers_with_the_weights_it_says(family, finished, capfd):
    told = "the checkpoint of the lowest validation loss, 1.2500", "the newest whole checkpoint", "the checkpoint asked"
    for (wanted, step), words in zip({"best": 2, "last": 4, "1": 1}.items(), told, strict=True):
        checkpoint = finished / f"checkpoint-{step}"
        expected = family.logits(checkpoint)
        capfd.readouterr()
        assert torch.equal(family.logits(finished, "--checkpoint", wanted), expected)
        first = capfd.readouterr().err.splitlines()[0]
        assert first.startswith(f"{checkpoint}: ") and words in first and "not finished" not in first
        assert torch.equal(expected, family.logits(finished)) == (step == 4)
    assert str(finished / "checkpoint") not in capfd.readouterr().err


def test_a_run_that_was_stopped_answers_with_its_last_checkpoint(family, stopped, capfd):
    expected = family.logits(stopped / "checkpoint-2")
    capfd.readouterr()
    family.recipe("predict").main(["--model_save_dir", str(stopped), "--query", "1+1", "--max_new_tokens", "4"])
    first = capfd.readouterr().err.splitlines()[0]
    words = "最近的完整检查点 the newest whole checkpoint; 训练没有完成 the run is not finished"
    assert first == f"{stopped / 'checkpoint-2'}: {words}"
    assert torch.equal(family.logits(stopped), expected)
    assert not torch.equal(family.logits(stopped, "--checkpoint", 1), expected)
    assert "the checkpoint asked for; 训练没有完成 the run is not finished" in capfd.readouterr().err


def test_a_checkpoint_is_scored_apart_from_its_run(family, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "out")
    before = (folder / "all_results.json").read_bytes()
    score = ["--model_save_dir", folder, "--data_path", family.parent / "rows.jsonl", "--limit", 2]
    family.recipe("evaluation").main([str(flag) for flag in [*score, "--max_new_tokens", 4, "--checkpoint", "best"]])
    assert (folder / "all_results.json").read_bytes() == before and not (folder / "predictions.jsonl").exists()
    assert "tuned" in read(folder / "checkpoint-2", "all_results.json")
    assert torch.equal(family.logits(folder, "--checkpoint", "best"), family.logits(finished, "--checkpoint", 2))


def test_a_checkpoint_is_exported_beside_its_run(family, stopped, tmp_path, capsys):
    folder = shutil.copytree(stopped, tmp_path / "out")
    family.recipe("export").main(["--model_save_dir", str(folder), "--dtype", "float32", "--checkpoint", "1"])
    whole = tmp_path / "out_checkpoint-1_merged"
    assert read(whole, "export.json")["run"] == str(folder / "checkpoint-1")
    printed = capsys.readouterr().out
    told = f"cd {tmp_path}/out_checkpoint-1_gguf && ollama create out_checkpoint-1_gguf -f" in printed
    assert (
        told
        == ("ollama:" in printed)
        == ("ollama" in family.prompt.ENGINES.get(read(whole, "config.json")["model_type"], {}))
    )
    cfg, flags = family.parse(ExportFlags, "--model_save_dir", folder)
    assert new_folder(chosen.choose(cfg, flags), flags) == tmp_path / "out_checkpoint-2_merged"


def test_a_checkpoint_is_served(family, finished, monkeypatch):
    from common.serving import app

    seen = []
    monkeypatch.setattr(app, "run", lambda load, cfg, flags: seen.append((cfg.model_save_dir, load(cfg, False))))
    family.recipe("post_api").main(["--model_save_dir", str(finished), "--checkpoint", "best", "--dtype", "float32"])
    ((folder, answer),) = seen
    assert folder == str(finished / "checkpoint-2")
    with torch.inference_mode():
        logits = answer.net(torch.tensor([answer.fitted_ids(QUESTION)])).logits
    assert torch.equal(logits, family.logits(finished, "--checkpoint", 2))


@pytest.mark.parametrize("tuning", ["full", "freeze", "qlora"])
def test_checkpoints_of_other_tunings_answer(gemma, tuning):
    folder = gemma.stop(f"stopped_{tuning}", 2, *STEPS, "--val_set_size", 0, "--tuning", tuning)
    assert torch.equal(gemma.logits(folder), gemma.logits(folder / "checkpoint-2"))
    assert not torch.allclose(gemma.logits(folder), gemma.logits(folder, "--checkpoint", 1))


def test_a_checkpoint_is_one_more_adapter_of_a_service(gemma, tmp_path):
    folder = gemma.train("served", *STEPS, "--val_set_size", 0)
    answer = gemma.recipe("predict").load_answer(gemma.parse(PredictFlags, "--model_save_dir", folder)[0])
    in_peft = adapters.load(answer, [f"early={folder / 'checkpoint-1'}"])["early"]
    assert in_peft in answer.net.peft_config
    split = shutil.copytree(folder, tmp_path / "split") / "checkpoint-1"
    (split / "whole.json").unlink()
    with pytest.raises(UserError, match="not a whole checkpoint"):
        adapters.load(answer, [f"cut={split}"])


@pytest.fixture(scope="module")
def gemma_stopped(gemma):
    return gemma.stop("stopped", 3, *STEPS, "--val_set_size", 0)


def test_what_no_checkpoint_is_found_for_is_one_line(gemma, gemma_stopped, tmp_path, line_of):
    predict, given = gemma.recipe("predict").main, ["--query", "1", "--model_save_dir"]
    line = line_of(predict, *given, gemma_stopped, "--checkpoint", 7)
    assert line.endswith(f"--checkpoint 7: {gemma_stopped} 里没有 has none of that step; there are: 1 2 3")
    line = line_of(predict, *given, gemma_stopped, "--checkpoint", "best")
    assert "has no checkpoint with a validation loss" in line and line.endswith("give last, or a step: 1 2 3")
    assert "is no run's folder" in line_of(predict, *given, tmp_path, "--checkpoint", "last")
    line = line_of(predict, *given, gemma_stopped, "--checkpoint", 1, "--base")
    assert line.endswith("--checkpoint 1 对 --base 不起作用 has no effect with --base; leave one out")
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(gemma_stopped / "run_manifest.json", empty)
    assert "the run is not finished, and 没有完整的检查点 has no whole" in line_of(predict, *given, empty)
    assert "--checkpoint last: 没有完整的检查点" in line_of(predict, *given, empty, "--checkpoint", "last")


@pytest.mark.parametrize("value", ["first", "-1", "1.5", ""])
def test_other_words_are_out_of_range(gemma, value, capsys):
    for flags_class in (PredictFlags, EvaluationFlags, ServeFlags, ExportFlags):
        with pytest.raises(SystemExit) as ended:
            gemma.parse(flags_class, f"--checkpoint={value}")
        assert ended.value.code == 2 and "must be best, last or a step" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over_and_left_there(gemma, gemma_stopped, tmp_path):
    folder = shutil.copytree(gemma_stopped, tmp_path / "out")
    (folder / "checkpoint-3/whole.json").unlink()  # as while a run that goes on is writing it
    assert chosen.chosen_folder(folder) == folder / "checkpoint-2" == chosen.chosen_folder(folder, "last")
    assert (folder / "checkpoint-3").is_dir()


def test_the_best_that_is_gone_is_told(gemma, gemma_stopped, tmp_path, capfd):
    folder = shutil.copytree(gemma_stopped, tmp_path / "out")
    set_losses(folder, {1: float("nan"), 2: 1.0, 3: 2.0})
    shutil.rmtree(folder / "checkpoint-2")
    assert chosen.chosen_folder(folder, "best") == folder / "checkpoint-3"
    assert "validation loss, 2.0000, 第 2 步的已不在 that of step 2 (1.0000) is gone" in capfd.readouterr().err


def test_other_folders_beside_checkpoints_do_not_stop_a_resume(gemma, gemma_stopped, tmp_path):
    folder = shutil.copytree(gemma_stopped, tmp_path / "out")
    (folder / "checkpoint-1_merged").mkdir()
    gemma.recipe("train").main(gemma.flags(folder, *STEPS, "--val_set_size", 0))
    assert read(folder, "run_manifest.json")["state"] == "finished" and (folder / "checkpoint-1_merged").is_dir()


def test_a_pissa_run_that_is_not_finished_is_refused_by_name(gemma, line_of):
    folder = gemma.stop("pissa", 1, *STEPS, "--val_set_size", 0, "--use_pissa")
    line = line_of(gemma.recipe("predict").main, "--model_save_dir", folder, "--query", "1")
    assert f"{folder / 'checkpoint-1'}: PiSSA 的检查点要配被拆分的基座" in line


# ---------------------------------------------------------------- --adapter_name_or_path


SHAPE = ["--lora_r", 4, "--lora_alpha", 12, "--use_rslora", "--use_dora"]


@pytest.fixture(scope="module")
def parent(family):
    """A run whose shape is not the family's default."""
    return family.train("parent", *STEPS, "--val_set_size", 0, *SHAPE)


def started(family, *flags, data="other"):
    """(config, folder of the adapter, tokenizer, net) of a run with these flags before its first step."""
    cfg, given = family.parse(TrainFlags, *family.flags("never", *flags, data=data))
    cfg, folder = lineage.inherit(cfg, given)
    tokenizer = loading.load_tokenizer(cfg.base, family.prompt)
    net = tuning.make_trainable(loading.load_base(cfg.base, cfg.dtype, cfg.bits), cfg, parent=folder)
    return cfg, folder, tokenizer, net


def test_it_starts_from_the_adapters_very_weights(family, parent, tmp_path):
    cfg, folder, tokenizer, net = started(family, "--adapter_name_or_path", parent)
    assert folder == parent
    assert (cfg.lora_r, cfg.lora_alpha, cfg.use_rslora, cfg.use_dora) == (4, 12, True, True)
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(weights(parent)) and all("lora_" in name for name in trained)
    run.save_tuned(net, tokenizer, tmp_path)
    assert equal(weights(tmp_path), weights(parent))
    assert read(tmp_path, "adapter_config.json") == read(parent, "adapter_config.json")


def test_its_first_loss_is_what_the_adapter_scores_there(family, parent):
    """Step 1 of a run whose one batch is all its rows, against the earlier run's validation of them."""
    more = ["--adapter_name_or_path", parent, "--max_steps", 2, "--micro_batch_size", 24, "--batch_size", 24]
    more += ["--val_set_size", 0, "--logging_steps", 1, "--lora_dropout", 0]
    folder = family.train("child", *more, data="other")
    first = json.loads((folder / "trainer_log.jsonl").read_text().splitlines()[0])["loss"]
    cfg, _ = family.parse(TrainFlags, *family.flags("child", *more, data="other"))
    tokenizer = loading.load_tokenizer(cfg.base, family.prompt)
    rows = dataset.prepare(cfg, tokenizer, family.prompt).train.with_format("numpy")
    batch = batches.collate([rows[number] for number in range(len(rows))], pad_id=0)
    batch = {name: value for name, value in batch.items() if name not in ("where", "tokens")}
    net = adapter.attach(loading.load_base(cfg.base, cfg.dtype), parent)
    with torch.no_grad(), loss.supervised(net):
        sums, counts = net(**batch)["logits"].T
    assert first == pytest.approx(float(sums.sum() / counts.sum()), rel=1e-5)


def test_the_lineage_grows_and_is_kept(family, parent, tmp_path):
    flags = ["--val_set_size", 0, "--max_steps", 1, "--adapter_name_or_path"]
    second = family.train("second", *flags, parent, data="other")
    third = family.train("third", *flags, second / "checkpoint-1")
    (one,) = read(second, "run_manifest.json")["lineage"]
    assert one["folder"] == str(parent) and one["data"] == read(parent, "run_manifest.json")["data"]
    told = read(third, "run_manifest.json")["lineage"]
    assert told[0] == one and [entry["folder"] for entry in told] == [str(parent), str(second / "checkpoint-1")]
    assert told[1]["data"][0]["path"] == str(family.parent / "other.jsonl")
    assert len({entry["sha256"] for entry in told}) == 2
    card = (third / "README.md").read_text()
    assert "## Started from\n\n- `" in card and all(entry["sha256"][:12] in card for entry in told)
    assert "  - `other.jsonl`: 24 rows" in card and "Started from" not in (parent / "README.md").read_text()
    from common.evaluation import overlap

    rows = [("x:1", [Turn("user", "1+7"), Turn("assistant", "8")]), ("x:2", [Turn("user", "?"), Turn("assistant", "")])]
    assert overlap.count(read(second, "run_manifest.json"), rows)["questions"] == 1, "what the parent was trained on"
    assert not torch.equal(family.logits(third), family.logits(parent))


def test_such_a_run_resumes_bit_for_bit(family, parent):
    more = [*STEPS, "--val_set_size", 0, "--adapter_name_or_path", parent]
    whole = family.train("uninterrupted", *more, data="other")
    cut = family.stop("resumed", 2, *more, data="other")
    with pytest.raises(UserError, match=r"adapter_name_or_path: \w{64} → None"):
        family.train("resumed", *STEPS, "--val_set_size", 0, *SHAPE, "--resume_anyway", data="other")
    family.train("resumed", *more, data="other")
    assert (cut / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    assert not equal(weights(whole), weights(parent))


def test_a_run_that_was_stopped_is_trained_on_from_its_last_checkpoint(family, stopped, capfd):
    _, folder, _, net = started(family, "--adapter_name_or_path", stopped)
    assert folder == stopped / "checkpoint-2" and "the run is not finished" in capfd.readouterr().err
    assert equal(adapter_state(net), weights(folder))


def adapter_state(net):
    from common.model.verify import adapter_state as state

    return {name: tensor.detach() for name, tensor in state(net).items()}


@pytest.fixture(scope="module")
def shaped(gemma):
    return gemma.train("shaped", "--max_steps", 1, "--val_set_size", 0, *SHAPE)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--lora_r", 8], "--lora_r 8: 适配器的是 the adapter in {parent} has 4; leave the flag out"),
        (["--lora_alpha", 4], "--lora_alpha 4: 适配器的是 the adapter in {parent} has 12"),
        (["--use_rslora", "false"], "--use_rslora False: 适配器的是 the adapter in {parent} has True"),
        (["--use_dora", "false"], "--use_dora False: 适配器的是 the adapter in {parent} has True"),
        (["--target_modules", "all-linear"], "--target_modules all-linear: 适配器的是 the adapter in {parent} has "),
        (["--modules_to_save", "all-norm"], "--modules_to_save all-norm: 适配器的是 the adapter in {parent} has none"),
        (["--tuning", "full"], "--adapter_name_or_path 与 --tuning full 不能同用"),
        (["--tuning", "freeze"], "--adapter_name_or_path 与 --tuning freeze 不能同用"),
        (["--tuning", "qlora", "--quantization_bit", 8], "--use_dora 与 --quantization_bit 8 不能同用"),
        (["--use_pissa", "--use_dora", "false"], "--adapter_name_or_path 与 --use_pissa 不能同用"),
        (["--model_save_dir", "{parent}"], "就在 is in --model_save_dir"),
    ],
)
def test_what_the_adapter_decides_is_not_changed(gemma, shaped, flags, told, line_of, tmp_path):
    flags = [str(flag).format(parent=shaped) for flag in flags]
    given = gemma.flags(tmp_path.name, "--adapter_name_or_path", shaped, *flags)
    assert told.format(parent=shaped) in line_of(gemma.recipe("train").main, *given)
    assert (shaped / "adapter_model.safetensors").is_file()


def test_thoughts_are_not_kept_in_the_style_of_a_run_that_shows_none(gemma, shaped, line_of, tmp_path):
    plain = shutil.copytree(shaped, tmp_path / "plain")
    manifest = read(plain, "run_manifest.json")
    manifest["config"]["prompt_style"] = "plain"
    (plain / "run_manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    given = gemma.flags(tmp_path.name, "--adapter_name_or_path", plain, "--thinking", "keep")
    told = f"--adapter_name_or_path {plain}: --thinking keep 对 --prompt_style plain 不起作用"
    assert told in line_of(gemma.recipe("train").main, *given)


def test_the_same_shape_may_be_said(gemma, shaped):
    cfg, *_ = started(gemma, "--adapter_name_or_path", shaped, *SHAPE, "--target_modules", "v_proj,q_proj,k_proj")
    assert cfg.lora_r == 4


def test_another_base_is_refused_by_name(gemma, shaped, tmp_path, line_of):
    other = shutil.copytree(gemma.base, tmp_path / "base")
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    given = gemma.flags("refused", "--adapter_name_or_path", shaped, "--path_model_pretrain", other)
    assert line_of(gemma.recipe("train").main, *given).endswith(
        f"{shaped}: 基座不同 its base is {gemma.base}, this run's is {other}; give --path_model_pretrain {gemma.base}"
    )


@pytest.fixture
def foreign(gemma, tmp_path):
    """An adapter as another tool leaves one: bf16, no manifest."""
    folder = gemma.parent / "plain"
    if not folder.is_dir():
        gemma.train("plain", "--max_steps", 1, "--val_set_size", 0)
    copy = tmp_path / "foreign"
    copy.mkdir()
    shutil.copy(folder / "adapter_config.json", copy)
    save_file({name: tensor.bfloat16() for name, tensor in weights(folder).items()}, copy / "adapter_model.safetensors")
    return copy


def test_another_tools_adapter_is_trained_on(gemma, foreign, tmp_path):
    file = foreign / "adapter_config.json"
    told = read(foreign, "adapter_config.json")
    file.write_text(json.dumps(told | {"base_model_name_or_path": "/gone", "target_modules": r".*\.(q|k|v)_proj"}))
    cfg, _, tokenizer, net = started(gemma, "--adapter_name_or_path", foreign)
    assert cfg.target_modules == (r".*\.(q|k|v)_proj",)
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters() if parameter.requires_grad)
    run.save_tuned(net, tokenizer, tmp_path)
    assert all(torch.equal(weights(tmp_path)[name], tensor.float()) for name, tensor in weights(foreign).items())
    assert read(tmp_path, "adapter_config.json")["base_model_name_or_path"] == str(gemma.base)
    folder = gemma.train("of_foreign", "--adapter_name_or_path", foreign, "--max_steps", 1, "--val_set_size", 0)
    assert read(folder, "run_manifest.json")["lineage"][0]["data"] == []
    assert "what its folder does not say" in (folder / "README.md").read_text()
    assert gemma.logits(folder).isfinite().all()


def test_a_base_left_out_is_asked_for(gemma, foreign, line_of):
    train = gemma.recipe("train").main
    line = line_of(train, "--adapter_name_or_path", foreign, "--model_save_dir", gemma.parent / "refused")
    assert line.endswith(f"give --path_model_pretrain {gemma.base}")


@pytest.mark.parametrize("kind", ["missing", "no adapter", "whole", "other kind", "cut off", "split", "bad rank"])
def test_what_is_no_adapter_to_start_from_is_one_line(gemma, foreign, kind, line_of, tmp_path):
    file, folder = foreign / "adapter_config.json", foreign
    if kind == "missing":
        folder = tmp_path / "nowhere"
    elif kind == "no adapter":
        file.unlink()
    elif kind == "whole":
        folder = gemma.train("whole", "--max_steps", 1, "--val_set_size", 0, "--tuning", "full")
    elif kind == "cut off":
        path = foreign / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
    else:
        change = {"other kind": {"peft_type": "IA3"}, "split": {"init_lora_weights": "pissa"}, "bad rank": {"r": "x"}}
        file.write_text(json.dumps(read(foreign, "adapter_config.json") | change[kind]))
    line = line_of(gemma.recipe("train").main, *gemma.flags("refused", "--adapter_name_or_path", folder))
    assert str(folder) in line
    told = {"missing": "no such folder", "whole": "give it as --path_model_pretrain", "split": "PiSSA"}
    assert told.get(kind, "") in line


def test_qlora_goes_on_as_qlora_and_from_lora(gemma, foreign, tmp_path):
    more = ["--max_steps", 1, "--val_set_size", 0]
    four = gemma.train("four", *more, "--tuning", "qlora")
    cfg, *_, net = started(gemma, "--adapter_name_or_path", four)
    assert (cfg.tuning, cfg.bits) == ("qlora", 4) and equal(adapter_state(net), weights(four))
    cfg, *_ = started(gemma, "--adapter_name_or_path", four, "--tuning", "lora")
    assert cfg.bits == 0
    eight = gemma.train("eight", *more, "--adapter_name_or_path", foreign, "--tuning", "qlora", "--quantization_bit", 8)
    assert read(eight, "run_manifest.json")["config"]["quantization_bit"] == 8


def test_modules_trained_in_full_are_trained_on(gemma):
    more = ["--max_steps", 1, "--val_set_size", 0]
    folder = gemma.train("norms", *more, "--modules_to_save", "all-norm")
    cfg, *_, net = started(gemma, "--adapter_name_or_path", folder, "--modules_to_save", "all-norm")
    assert equal(adapter_state(net), weights(folder)) and any("norm" in name for name in weights(folder))
    assert all(p.requires_grad for name, p in net.named_parameters() if "modules_to_save" in name)
    cfg, *_ = started(gemma, "--adapter_name_or_path", folder)
    assert cfg.modules_to_save == ("input_layernorm", "norm", "post_attention_layernorm")


def test_a_pissa_run_is_trained_on_as_the_lora_it_is_saved_as(gemma):
    folder = gemma.train("pissa_done", "--max_steps", 1, "--val_set_size", 0, "--use_pissa", "--lora_r", 4)
    cfg, *_, net = started(gemma, "--adapter_name_or_path", folder)
    assert (cfg.lora_r, cfg.use_pissa) == (8, False) and equal(adapter_state(net), weights(folder))


def test_check_tries_it_too(gemma, foreign, capsys):
    given = gemma.flags("checked", "--adapter_name_or_path", foreign, "--check", "--json")
    gemma.recipe("train").main(given)
    captured = capsys.readouterr()
    assert json.loads(captured.out)["verdict"] == "good" and f"起点 start: {foreign}: lora_r 16" in captured.err


def test_a_template_that_has_changed_since_is_refused(gemma, foreign, monkeypatch):
    folder = gemma.parent / "plain"
    told = manifest.read_manifest(folder)
    told["template"]["text"] += "?"
    monkeypatch.setattr(lineage.adopted, "find_manifest", lambda where: told if str(where) == str(folder) else None)
    with pytest.raises(UserError, match=re.escape("提示模板 prompt template 与训练时不同")):
        gemma.train("refused", "--adapter_name_or_path", folder, "--max_steps", 1, "--val_set_size", 0)


def test_a_run_answers_with_the_penalty_it_was_trained_by(gemma):
    """Also one of its checkpoints, and the model exported from it; a flag wins, and the base has the default."""
    folder = gemma.train("penalised", *STEPS, "--val_set_size", 0, "--repetition_penalty", 1.25)

    def penalty(place, *flags):
        return chosen.choose(*gemma.parse(PredictFlags, "--model_save_dir", place, *flags)).repetition_penalty

    assert penalty(folder) == penalty(folder, "--checkpoint", 1) == penalty(folder / "checkpoint-2") == 1.25
    assert penalty(folder, "--repetition_penalty", 1.0) == 1.0 == penalty(folder, "--base")
    elsewhere = ("--base_url", "http://x/v1")
    assert penalty(folder, *elsewhere) == 1.25 and penalty(folder, *elsewhere, "--base") == 1.0
    merged = gemma.parent / "penalised_whole"
    gemma.recipe("export").main(["--model_save_dir", str(folder), "--output_dir", str(merged)])
    assert json.loads((merged / "generation_config.json").read_text())["repetition_penalty"] == 1.25
    assert "PARAMETER repeat_penalty 1.25\nPARAMETER repeat_last_n 65536\n" in (merged / "Modelfile").read_text()
