"""What goes wrong in fine-tuning, row by row of pains.md: each guard at work, some also switched off, to see the harm.

Thin on purpose: the details are tested beside each part. The tests of rows 21 and 22 are in test_processes.py and
test_service.py, with the processes and servers they need.
"""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from common.cli import parse
from common.config import TrainFlags
from common.conversation import render
from common.conversation.render import TooLongError
from common.conversation.turns import Conversation, FormatError, Turn
from common.data import dataset, formats, sources
from common.device import resolve_dtype
from common.errors import UserError
from common.evaluation import evaluate, metrics
from common.export import merging, proof
from common.inference import tuned
from common.inference.answerer import Answer
from common.model import loading, loss, verify
from common.model.loss import IGNORED
from common.runs import checkpoints, manifest
from common.training import batches, callbacks, guards, packing, trainer
from gemma_sft import prompt
from gemma_sft.ft_gemma import export as export_recipe
from gemma_sft.ft_gemma import predict, train
from gemma_sft.ft_gemma.config import Config

ROOT = Path(__file__).resolve().parents[1]
BOS, EOS, START, END = 2, 1, 5, 6


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"query": f"{n}+1", "response": str(n + 1)}) + "\n" for n in range(24)))
    return path


@pytest.fixture(scope="module")
def flags(small_gemma, rows_file, tmp_path_factory):
    """flags(folder, *more): the command line of a short run into it."""
    cache = tmp_path_factory.mktemp("cache")

    def make(folder, *more):
        given = ["--path_model_pretrain", small_gemma, "--data_path", rows_file, "--cache_dir", cache, "--eval_rows", 0]
        given += ["--sample_rows", 0]
        given += ["--learning_rate", 0.01, "--max_steps", 2, "--model_save_dir", folder]
        return [str(flag) for flag in [*given, *more]]

    return make


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "out"
    train.main(flags(folder))
    return folder


@pytest.fixture
def small_net(small_gemma):
    """The small model with the chunked loss, in training mode."""
    net = loading.load_base(small_gemma, "float32").train()
    with loss.supervised(net):
        yield net


def prepared(tmp_path, rows, tokenizer, **knobs):
    """TrainingData of a file of `rows` (dicts, or lines as they are)."""
    path = tmp_path / "data.jsonl"
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    )
    cfg = Config(data_path=(str(path),), cache_dir=str(tmp_path / "cache"), **({"val_set_size": 0} | knobs))
    return dataset.prepare(cfg, tokenizer, prompt)


def batch_of(*lengths):
    """Padded rows of random ids, the second half of each supervised."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(7, 300, (length,), generator=generator).tolist()
        labels = [IGNORED] * (length // 2) + ids[length // 2 :]
        rows.append({"input_ids": ids, "labels": labels, "where": f"f:{number}"})
    batch = batches.collate(rows, pad_id=0)
    return {name: batch[name] for name in ("input_ids", "labels")}


def off(monkeypatch, holder, name):
    """Switch a guard off."""
    monkeypatch.setattr(holder, name, lambda *args, **kwargs: None)


def results_of(folder):
    return json.loads((folder / "all_results.json").read_text())


EXPLODING = ["--learning_rate", 1e30, "--max_steps", 4, "--save_steps", 1, "--val_set_size", 0]


def test_pain_01_a_loss_that_is_not_finite_stops_the_run(flags, tmp_path):
    with pytest.raises(UserError) as stopped:
        train.main(flags(tmp_path / "out", *EXPLODING))
    message = str(stopped.value)
    assert "at step 2" in message and "rows.jsonl:" in message and "--dtype float32" in message
    assert checkpoints.last_whole_checkpoint(tmp_path / "out").name == "checkpoint-1"
    assert resolve_dtype("auto") in (torch.float32, torch.bfloat16)


def test_pain_01_without_the_guard_it_trains_on_to_the_end(flags, tmp_path, monkeypatch):
    off(monkeypatch, guards.Guard, "on_pre_optimizer_step")
    off(monkeypatch, verify, "verify_adapter")
    train.main(flags(tmp_path / "out", *EXPLODING))
    assert results_of(tmp_path / "out")["steps"] == 4 and math.isnan(results_of(tmp_path / "out")["train_loss"])


def test_pain_02_a_row_without_a_supervised_id_is_dropped_and_listed(tmp_path, tokenizer, monkeypatch):
    filled = {"system": "规则" * 300, "query": "问", "response": "答"}  # the prompt alone fills the length
    rows = prepared(tmp_path, [filled, {"query": "问", "response": "答"}], tokenizer, max_length_q=60)
    assert len(rows.train) == 1 and [row.where[-2:] for row in rows.rejected] == [":1"]
    assert any(label != IGNORED for label in rows.train[0]["labels"])
    monkeypatch.setattr(render, "labels_of", lambda found, loss_on: [IGNORED] * len(render.joined(found)))
    with pytest.raises(UserError, match="no row can be trained on.*no id of the row is supervised"):
        prepared(tmp_path, [{"query": "问", "response": "答答"}], tokenizer)


def test_pain_03_padding_is_no_end_and_every_answer_has_one(tmp_path, tokenizer, trained, flags):
    batch = batches.collate([{"input_ids": [9, EOS], "labels": [IGNORED, EOS], "where": "f:1"}] * 2, pad_id=EOS)
    assert batch["labels"].tolist() == [[IGNORED, EOS]] * 2 and "attention_mask" not in batch
    rows = prepared(tmp_path, [{"query": "a", "response": "b", "history": [["c", "d"]]}], tokenizer)
    assert rows.train[0]["labels"].count(END) == 2 and rows.train[0]["labels"][-1] == END
    assert predict.load_answer(parse(Config, TrainFlags, flags(trained))[0]).stop_ids == [END, EOS]
    assert manifest.read_manifest(trained)["stop_ids"] == [END, EOS]


@pytest.mark.parametrize("style", prompt.STYLES)
def test_pain_04_only_what_a_user_wrote_is_cut(tokenizer, style):
    turns = [Turn("user", "问" * 90), Turn("assistant", "答" * 20)]
    whole = render.training_sample(tokenizer, prompt, turns, style, "answer", 200, 21)
    cut = render.training_sample(tokenizer, prompt, turns, style, "answer", 60, 21)
    assert cut.cut and cut.input_ids[-21:] == whole.input_ids[-21:], "answer and stop token are whole"
    assert [i for i in cut.input_ids if i in (BOS, START, END)] == [
        i for i in whole.input_ids if i in (BOS, START, END)
    ]
    with pytest.raises(TooLongError):
        render.training_sample(tokenizer, prompt, turns, style, "answer", 60, 20)


def one_newline_less(monkeypatch):
    whole = prompt.render
    monkeypatch.setattr(prompt, "render", lambda *args: whole(*args)[:-1] + [whole(*args)[-1]._replace(ids=[])])


def test_pain_05_another_template_than_the_one_trained_with_is_refused(trained, flags, monkeypatch):
    cfg, _ = parse(Config, TrainFlags, flags(trained))
    answerer, turns = predict.load_answer(cfg), [Turn("user", "a"), Turn("assistant", "b")]
    sample = render.training_sample(answerer.tokenizer, prompt, turns, "chat", "answer", 50, 50)
    ids = answerer.fitted_ids(turns[:1])
    assert sample.input_ids[: len(ids)] == ids, "one renderer for training and answering"
    one_newline_less(monkeypatch)
    with pytest.raises(UserError, match="提示模板 prompt template .* is not the one trained with"):
        predict.load_answer(cfg)


def test_pain_05_without_the_guard_it_answers_another_prompt(trained, flags, monkeypatch):
    cfg, _ = parse(Config, TrainFlags, flags(trained))
    ids = predict.load_answer(cfg).fitted_ids([Turn("user", "a")])
    one_newline_less(monkeypatch)
    off(monkeypatch, tuned, "check_fits")
    assert predict.load_answer(cfg).fitted_ids([Turn("user", "a")]) != ids


@pytest.mark.parametrize("style", prompt.STYLES)
def test_pain_06_exactly_one_bos(tokenizer, style):
    turns = [Turn("system", "s"), Turn("user", "<bos>a"), Turn("assistant", "b"), Turn("user", "c")]
    ids = render.prompt_ids(tokenizer, prompt, turns, style, 500)[0]
    assert ids.count(BOS) == 1 and ids[0] == BOS


def test_pain_07_a_system_text_is_folded_into_the_question(tokenizer):
    turns = [Turn("system", "规则"), Turn("user", "问")]
    ids = render.prompt_ids(tokenizer, prompt, turns, "chat", 500)[0]
    assert ids == render.prompt_ids(tokenizer, prompt, [Turn("user", "规则\n\n问")], "chat", 500)[0]
    messages = [{"role": "system", "content": "规则"}, {"role": "user", "content": "问"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ids


def cut_off(monkeypatch):
    """The old remedy for "does not require grad": the loss then trains nothing."""
    whole = loss.token_losses
    monkeypatch.setattr(loss, "token_losses", lambda *args: whole(*args).detach().requires_grad_(True))


def test_pain_08_an_adapter_without_gradient_stops_the_run(flags, tmp_path, monkeypatch):
    cut_off(monkeypatch)
    with pytest.raises(UserError, match="trainable tensors got no gradient in the first step, e.g. .*lora_B"):
        train.main(flags(tmp_path / "out"))


def test_pain_08_without_the_guard_a_run_that_learns_nothing_ends_well(flags, tmp_path, monkeypatch):
    cut_off(monkeypatch)
    off(monkeypatch, guards.Gradients, "check")
    off(monkeypatch, trainer.tuning, "settle")  # these two would see it at the end, after all the hours
    off(monkeypatch, verify, "verify_adapter")
    train.main(flags(tmp_path / "out"))
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)


def test_pain_09_accumulation_does_not_change_the_gradient(small_net):
    batch = batch_of(30, 8, 21, 5)
    counted = (batch["labels"][:, 1:] != IGNORED).sum()
    small_net(**batch).loss.backward()
    whole = {name: p.grad.clone() for name, p in small_net.named_parameters()}
    small_net.zero_grad()
    for row in range(4):
        small_net(
            **{name: tensor[row : row + 1] for name, tensor in batch.items()}, num_items_in_batch=counted
        ).loss.backward()
    for name, p in small_net.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-4, atol=1e-6)


def test_pain_10_accumulation_never_exceeds_the_epoch():
    plan = trainer.make_plan(Config(micro_batch_size=4, batch_size=4096, epochs=2), 10)
    assert (plan["accumulation"], plan["steps_per_epoch"], plan["total_steps"]) == (3, 1, 2)


def test_pain_11_a_resume_is_the_same_run_and_refuses_another(flags, tmp_path, monkeypatch):
    more = ["--max_steps", 4, "--save_steps", 2, "--lora_dropout", 0.1]
    train.main(flags(tmp_path / "whole", *more))
    with monkeypatch.context() as dying:
        dying.setattr(callbacks.StopOnSignal, "on_step_end", lambda self, args, state, *rest, **kw: die(state, 3))
        with pytest.raises(RuntimeError, match="died"):
            train.main(flags(tmp_path / "halves", *more))
    with pytest.raises(UserError, match="data or options differ from that run .*seed: 42 → 7"):
        train.main(flags(tmp_path / "halves", *more, "--seed", 7))
    train.main(flags(tmp_path / "halves", *more))
    whole, halves = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "halves"))
    assert whole == halves


def die(state, step):
    if state.global_step == step:
        raise RuntimeError("died")


class Largest(TorchDispatchMode):
    """The most elements of a tensor made within."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.found = max(self.found, tensor.numel())
        return made


@pytest.mark.parametrize("training", [True, False], ids=["12", "14"])
def test_pain_12_and_14_no_tensor_of_all_logits(small_net, training):
    batch, vocabulary = batch_of(*[300] * 8), 314
    with Largest() as largest:
        output = small_net.train(training)(**batch)
        if training:
            output.loss.backward()
    assert 128 * vocabulary <= largest.found < 2 * 128 * vocabulary + 8 * 300 * 64
    assert largest.found < 8 * 300 * vocabulary / 2
    assert training or output.logits.shape == (8, 2), "evaluation keeps two numbers a row"


def test_pain_13_the_longest_batch_is_tried_before_the_run(flags, tmp_path, capsys):
    data = tmp_path / "late.jsonl"
    rows = [{"query": "1", "response": "2"}] * 40 + [{"query": "1", "response": "2" * 200}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    train.main(flags(tmp_path / "out", "--data_path", data, "--val_set_size", 0, "--check", "--json"))
    report = json.loads(capsys.readouterr().out)
    assert f"{data}:41" in report["step"]["where"] and report["step"]["length"] == report["lengths"]["tokens"]["p100"]
    assert report["memory"]["peak"] > 0


def orig_mod(monkeypatch):
    """What torch.compile before saving leaves: other names for the same weights."""
    whole = PeftModel.save_pretrained

    def save(self, folder, **kwargs):
        whole(self, folder, **kwargs)
        file = Path(folder) / "adapter_model.safetensors"
        save_file({f"_orig_mod.{name}": tensor for name, tensor in load_file(file).items()}, file)

    monkeypatch.setattr(PeftModel, "save_pretrained", save)


def test_pain_15_what_was_saved_is_reopened_and_compared(flags, tmp_path, monkeypatch):
    orig_mod(monkeypatch)
    with pytest.raises(UserError, match="does not fit: 12 缺少 missing"):
        train.main(flags(tmp_path / "out"))
    assert manifest.read_manifest(tmp_path / "out")["state"] == "training"


def test_pain_15_without_the_guard_the_saved_adapter_does_nothing(flags, tmp_path, monkeypatch, small_gemma):
    orig_mod(monkeypatch)
    off(monkeypatch, verify, "verify_adapter")
    train.main(flags(tmp_path / "out"))
    assert manifest.read_manifest(tmp_path / "out")["state"] == "finished"
    with warnings.catch_warnings(record=True) as told:  # what peft imports here for the first time may warn too
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(loading.load_base(small_gemma, "float32"), tmp_path / "out")
    assert any("missing adapter keys" in str(one.message) for one in told)
    assert not any(p.any() for name, p in loaded.named_parameters() if "lora_B" in name)


def exported(run_folder, folder, prompts):
    """Export the run into `folder`, proven on the questions in the file `prompts`."""
    export_recipe.main(
        ["--model_save_dir", str(run_folder), "--output_dir", str(folder), "--eval_data_path", str(prompts)]
    )


def forget_the_adapter(monkeypatch):
    whole = merging.merge

    def merge(tuned):
        whole(tuned)
        return loading.load_base(tuned.manifest["base"]["path"], "float32")

    monkeypatch.setattr(merging, "merge", merge)


def test_pain_16_a_merged_model_that_answers_otherwise_is_refused(trained, tmp_path, rows_file, monkeypatch):
    forget_the_adapter(monkeypatch)
    with pytest.raises(UserError, match="the exported model differs: a logit by"):
        exported(trained, tmp_path / "whole", rows_file)
    assert not (tmp_path / "whole").exists()


def test_pain_16_without_the_guard_it_is_written(trained, tmp_path, rows_file, monkeypatch, small_gemma):
    forget_the_adapter(monkeypatch)
    off(monkeypatch, proof, "compare")
    exported(trained, tmp_path / "whole", rows_file)
    written, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", small_gemma))
    assert all(torch.equal(tensor.float(), base[name]) for name, tensor in written.items())


def test_pain_17_saving_says_whether_the_adapter_serves_as_it_is(flags, tmp_path, trained):
    assert "can serve it beside its base" in results_of(trained)["serving"]
    train.main(flags(tmp_path / "out", "--modules_to_save", "lm_head"))
    serving = results_of(tmp_path / "out")["serving"]
    assert "merge it by export.py first" in serving and "modules_to_save" in serving


def test_pain_18_what_is_wrong_is_named_with_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "1", "response": "2"}\n{"query": "1", "response": \n{"query": "1", "respnse": "2"}\n')
    found = list(dataset.conversations(str(path), Config()))
    assert [row.where for row in found] == [f"{path}:{line}" for line in (1, 2, 3)]
    assert "broken JSON line" in found[1].reason and '"response": ' in found[1].row
    assert "unknown keys: query+respnse; nearest known shape: query+response" in found[2].reason


BROKEN = [{"query": "1", "response": "2"}, "{broken", {"query": "3", "response": "4"}, {"a": "b"}]


def test_pain_19_every_row_is_accounted_for(tmp_path, tokenizer):
    rows = prepared(tmp_path, BROKEN, tokenizer)
    assert [row.where[-2:] for row in rows.rejected] == [":2", ":4"]
    assert rows.sources[0]["rows"] == 4 == len(rows.train) + len(rows.rejected)
    with pytest.raises(UserError, match="data.jsonl:2: .*--strict"):
        prepared(tmp_path, BROKEN, tokenizer, strict=True)


def test_pain_19_without_the_guard_rows_vanish(tmp_path, tokenizer, monkeypatch):
    whole = formats.conversations_in

    def warn_and_continue(record, path, cfg, notes):
        return (row for row in whole(record, path, cfg, notes) if isinstance(row, Conversation))

    monkeypatch.setattr(dataset, "conversations_in", warn_and_continue)
    rows = prepared(tmp_path, BROKEN, tokenizer, strict=True)
    assert len(rows.train) == 2 == rows.sources[0]["rows"] and len(rows.rejected) == 0


def test_pain_20_changed_data_is_tokenised_anew(tmp_path, tokenizer):
    before = prepared(tmp_path, [{"query": "a", "response": "b"}], tokenizer).train[0]["input_ids"]
    after = prepared(tmp_path, [{"query": "a", "response": "c"}], tokenizer).train[0]["input_ids"]
    assert before != after
    assert (
        prepared(tmp_path, [{"query": "a", "response": "c"}], tokenizer, prompt_style="plain").train[0]["input_ids"]
        != after
    )


def test_pain_23_libraries_are_pinned_below_their_next_break():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = dict(line.replace("==", ">=", 1).split(">=", 1) for line in lines)
    assert all("<" in pins[name] for name in manifest.PACKAGES)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "gb18030"])
def test_pain_24_encodings_are_tolerated_or_named(tmp_path, encoding):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "问题在这里", "response": "回答"}\n', encoding=encoding)
    if encoding == "gb18030":
        with pytest.raises(UserError, match="rows.jsonl:1: .*looks like gb18030; convert it: iconv -f gb18030"):
            list(sources.read_records(str(path)))
    else:
        assert [record.value["query"] for record in sources.read_records(str(path))] == ["问题在这里"]


def test_pain_25_padding_changes_no_loss(small_net):
    batch = batch_of(40, 9)
    alone = {name: tensor[1:, :9] for name, tensor in batch.items()}
    sums = small_net.eval()(**batch).logits
    torch.testing.assert_close(sums[1:], small_net(**alone).logits, rtol=1e-5, atol=1e-5)


def test_pain_25_packed_rows_that_see_each_other_are_refused(tmp_path, tokenizer, small_net, monkeypatch):
    rows = prepared(tmp_path, [{"query": f"{n}", "response": f"{n}" * n} for n in range(1, 6)], tokenizer).train
    packs = packing.Packs(rows, 300, seed=1)
    assert len(packs) == 1
    packing.check_apart(small_net, packs, torch.float32)
    whole = packing.collate

    def one_row(packs, pad_id):
        batch = whole(packs, pad_id)
        return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}

    monkeypatch.setattr(packing, "collate", one_row)
    with pytest.raises(UserError, match="--packing: 样本互相可见 rows see each other"):
        packing.check_apart(small_net, packs, torch.float32)


def test_pain_26_answers_alone_are_scored_and_failures_count(tmp_path):
    cfg = Config(model_save_dir=str(tmp_path), path_model_pretrain="none", eval_batch_size=1)
    rows = [
        ("f:1", [Turn("user", "问"), Turn("assistant", "好的")]),
        ("f:2", [Turn("user", "问题"), Turn("assistant", "好的")]),
    ]

    def fake(questions, sampling, base=False):
        assert all(turns[-1].role == "user" for turns in questions), "the answer is not shown"
        if questions[0][-1].text == "问题":
            raise UserError("放不下")
        return [Answer("好的", "stop", 2)]

    scores = evaluate.evaluate(fake, rows, cfg)
    assert scores["rouge-l-f"] == pytest.approx(0.5), "one right, one that failed"
    assert "empty answer = 0" in metrics.signature()


def test_pain_27_other_columns_than_expected_are_named():
    with pytest.raises(FormatError, match="unknown keys: Frage\\+Reply"):
        formats.read_row({"Frage": "1", "Reply": "2"})


def test_pain_28_the_adapter_is_applied_once(trained, flags, small_gemma):
    net = predict.load_answer(parse(Config, TrainFlags, flags(trained))[0]).net
    names = [name for name, _ in net.named_parameters() if "lora_" in name]
    assert len(names) == 12 and not any(name.count("lora_A") + name.count("lora_B") > 1 for name in names)
    ids = torch.tensor([[BOS, START, 290, 291]])
    weight = net.base_model.model.model.layers[0].self_attn.q_proj
    a, b = weight.lora_A["default"].weight, weight.lora_B["default"].weight
    base = loading.load_base(small_gemma, "float32").model.layers[0].self_attn.q_proj
    hidden = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(weight(hidden), base(hidden) + 2.0 * hidden @ a.T @ b.T)
    assert net(input_ids=ids).logits.shape == (1, 4, 314)
