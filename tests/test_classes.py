"""Each model class of docs/models.md from the files to the exported model: see classes.CLASSES."""

import dataclasses
import json

import pytest
import torch
from classes import CLASSES, IDS, RECIPES, Checkpoint, logits_by_plain_peft
from commands import text_of
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from common.conversation.turns import Turn
from common.engine import batcher as engine
from common.engine.request import Ask
from common.errors import UserError
from common.export import proof
from common.inference.answerer import Sampling
from common.model import frozen_layers, loading
from common.model.loss import supervised
from common.training import curve, packing, tuning

QUESTIONS = [[Turn("user", text)] for text in ("1+1", "问" * 40, "有在他" * 5, "3+4")]


@pytest.fixture(scope="module", params=CLASSES)
def checkpoint(request, tmp_path_factory):
    return Checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """The folder of a short run by the family's own values, weights in 16 bits as a large model's.

    Its picture, which takes a second, is not drawn.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curve, "draw", lambda folder: None)
        patch.setattr(frozen_layers, "LEAST", 100)
        return checkpoint.train(
            tmp_path_factory.mktemp("run"), "--max_steps", 6, "--micro_batch_size", 8, "--batch_size", 8
        )


def test_its_loss_is_transformers_own(checkpoint, capsys):
    net = loading.load_base(checkpoint.folder, "float32")
    told = capsys.readouterr().err
    assert told.count("left out") == bool(checkpoint.kind.towers)
    if checkpoint.kind.towers:
        left = sum(p.numel() for p in checkpoint.whole.parameters()) - sum(p.numel() for p in net.parameters())
        assert f"left out: {checkpoint.kind.towers} ({left:,} " in told
    assert type(net).__name__ == checkpoint.name.replace("ForConditionalGeneration", "ForCausalLM")
    labels = IDS.clone()
    labels[:, :8] = -100
    with torch.no_grad():
        expected = checkpoint.whole(input_ids=IDS, labels=labels)
        torch.testing.assert_close(net(input_ids=IDS).logits, expected.logits, rtol=1e-6, atol=1e-6)
        with supervised(net), frozen_layers.lean(net):
            found = net(input_ids=IDS, labels=labels).loss
    torch.testing.assert_close(found, expected.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_rows_are_apart_or_refused(checkpoint, dtype):
    """The state of linear attention goes on from one row to the next: by 2 %, which bfloat16's rounding would hide."""
    net = loading.load_base(checkpoint.folder, dtype)
    rows = [{"input_ids": (IDS[n % 2, : 24 - 5 * n] + n).tolist(), "where": "f"} for n in range(3)]
    packs = FakePacks([[row | {"labels": row["input_ids"]} for row in rows]])
    if checkpoint.kind.packs:
        packing.check_apart(net, packs, getattr(torch, dtype))
    else:
        with pytest.raises(UserError, match="--packing: "):
            packing.check_apart(net, packs, getattr(torch, dtype))


class FakePacks(list):
    packs = property(list)

    def __getitems__(self, numbers):
        return [self[number] for number in numbers]


def test_all_linear_is_what_a_gradient_reaches(checkpoint):
    cfg = dataclasses.replace(checkpoint.recipe("config").Config(), target_modules=("all-linear",), lora_dropout=0.0)
    net = tuning.make_trainable(loading.load_base(checkpoint.folder, "float32"), cfg).train()
    with supervised(net):
        net(input_ids=IDS, labels=IDS).loss.backward()
    assert [name for name, weight in net.named_parameters() if weight.requires_grad and weight.grad is None] == []


def test_it_learns_in_every_layer(checkpoint, trained):
    log = [json.loads(line)["loss"] for line in (trained / "trainer_log.jsonl").read_text().splitlines()]
    assert log[-1] < log[0]
    names = load_file(trained / "adapter_model.safetensors").keys()
    layers = {str(number) for number in range(checkpoint.kind.text["num_hidden_layers"])}
    assert {name.split(".layers.")[1].split(".")[0] for name in names if ".layers." in name} == layers
    assert all(name.startswith("base_model.model.model.") and "indexer" not in name for name in names)
    taken = json.loads((trained / "run_manifest.json").read_text())["config"]["target_modules"]
    assert taken == (["q_proj", "k_proj", "v_proj"] if checkpoint.kind.reached else ["all-linear"])


def test_answers_do_not_depend_on_who_else_asks(checkpoint, trained, monkeypatch):
    """One by one, in one batch, and in the service, which reads long prompts in parts while others are under way."""
    monkeypatch.setattr(engine, "CHUNK", 16)
    answer, greedy = checkpoint.answerer(trained), Sampling(max_new_tokens=8)
    alone = [answer([turns], greedy)[0] for turns in QUESTIONS]
    assert answer(QUESTIONS, greedy) == alone
    if not checkpoint.kind.served:
        with pytest.raises(UserError, match="the service cannot batch rows of this model yet, whose layers keep"):
            engine.Batcher(answer, {"tuned": "default"})
        return
    batcher = engine.Batcher(answer, {"tuned": "default"}, slots=3)
    asks = [Ask(batcher.encoder.whole_ids(turns), Sampling(max_new_tokens=n + 5)) for n, turns in enumerate(QUESTIONS)]
    tickets = [batcher.submit("tuned", [ask]) for ask in asks]
    found = ["".join(part.text for parts in ticket.parts() for part in parts) for ticket in tickets]
    batcher.close()
    for n, turns in enumerate(QUESTIONS):
        assert found[n] == answer([turns], Sampling(max_new_tokens=n + 5))[0].text


def test_it_is_exported_and_plain_libraries_load_it(checkpoint, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "NEW_TOKENS", 4)
    monkeypatch.setattr(proof, "QUESTIONS", 3)
    folder, base = tmp_path / "merged", str(checkpoint.folder)
    checkpoint.recipe("export").main(["--model_save_dir", str(trained), "--output_dir", str(folder)])
    config = AutoConfig.from_pretrained(folder)
    name = checkpoint.name.replace("ForConditionalGeneration", "ForCausalLM")
    assert config.get_text_config() is config and config.architectures == [name]
    whole, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert all(key.startswith(("model.", "lm_head.")) for key in load_file(folder / "model.safetensors"))
    assert not any("language_model" in key for key in load_file(folder / "model.safetensors"))
    assert json.loads((trained / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    with torch.no_grad():
        expected = logits_by_plain_peft(base, trained)
        torch.testing.assert_close(whole(input_ids=IDS).logits, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "page, right, served, targets",
    [("models.md", "right", "yes", "q, k, v"), ("models_zh.md", "正确", "能", "q、k、v")],
)
def test_the_table_of_models_is_what_is_tried_here(page, right, served, targets):
    lines = [line.strip("| ").split(" | ") for line in text_of(f"docs/{page}").splitlines() if line.startswith("| `")]
    told = {
        cells[0].strip("`"): (
            *cells[2:3],
            *(cell == word for cell, word in zip(cells[5:8], (right, targets, served), strict=True)),
        )
        for cells in lines
        if len(cells) == 9  # not those of models that are this project's own
    }
    assert told == {
        name: (
            RECIPES[kind.family].removesuffix(".ft_gemma").removesuffix(".ft_qwen2").replace(".", "/"),
            kind.packs,
            kind.reached,
            kind.served,
        )
        for name, kind in CLASSES.items()
    }
