"""LoRA on embeddings, all linear layers and head, norms trained: the command of docs/methods.md, on small models."""

import json
import shlex

import pytest
import torch
from classes import IDS, Checkpoint, logits_by_plain_peft
from commands import ROOT, commands
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from common.conversation.turns import Turn
from common.export import proof
from common.inference.answerer import Sampling
from common.model import loading
from common.training import callbacks, curve

NAMES = ["Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"]
NAMES += ["Qwen3_5ForConditionalGeneration"]
(WORDS,) = [shlex.split(line) for line in commands("docs/methods.md") if "all-embedding" in line]
GIVEN = WORDS[WORDS.index("--model_name") : WORDS.index("--epochs")]
STEPS = ["--max_steps", 4, "--save_steps", 2, "--micro_batch_size", 4, "--batch_size", 8, "--sample_rows", 0]


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request, tmp_path_factory):
    return Checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def train(checkpoint, parent):
    files = ["--data_path", f"{parent / 'rows.jsonl'}#20", f"{ROOT / 'data/identity.jsonl'}#8"]
    return checkpoint.train(parent, *GIVEN, *files, *STEPS)


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curve, "draw", lambda folder: None)
        return train(checkpoint, tmp_path_factory.mktemp("run"))


def test_all_but_the_rest_is_reached_and_moves(checkpoint, trained):
    weights = load_file(trained / "adapter_model.safetensors")
    assert not [name for name in weights if "base_layer" in name], "the base's own matrices are not copied"
    named = loading.load_base(checkpoint.folder, "float32").named_modules()
    kinds = {f"base_model.model.{name}": module for name, module in named if list(module.parameters(recurse=False))}
    norms = {f"{name}.weight" for name, module in kinds.items() if "Norm" in type(module).__name__}
    on = {name for name, one in kinds.items() if isinstance(one, torch.nn.Linear | torch.nn.Embedding)}
    assert norms and {name for name in weights if "lora_" not in name} == norms
    assert {name.split(".lora_")[0] for name in weights if "lora_" in name} == on
    assert all(weight.count_nonzero() for weight in weights.values())
    log = [json.loads(line)["loss"] for line in (trained / "trainer_log.jsonl").read_text().splitlines()]
    assert log[-1] < log[0]
    config = json.loads((trained / "run_manifest.json").read_text())["config"]
    assert config["model_name"] == ["小黄", "Xiao Huang"] and config["adam_beta2"] == 0.95


def test_a_resume_is_the_same_run(checkpoint, trained, tmp_path, monkeypatch):
    saved = callbacks.WholeCheckpoints.on_save

    def die(self, args, state, control, **kwargs):
        saved(self, args, state, control, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(curve, "draw", lambda folder: None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(callbacks.WholeCheckpoints, "on_save", die)
        train(checkpoint, tmp_path)
    assert not (tmp_path / "out/adapter_model.safetensors").exists()
    found, expected = (load_file(one / "adapter_model.safetensors") for one in (train(checkpoint, tmp_path), trained))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], msg=name)


def test_the_exported_model_is_that_of_plain_libraries(checkpoint, trained, tmp_path, monkeypatch):
    """Its head has a matrix of its own: merged into the one they share, each change would be in both."""
    monkeypatch.setattr(proof, "NEW_TOKENS", 4)
    monkeypatch.setattr(proof, "QUESTIONS", 3)
    asked, greedy = [[Turn("user", text)] for text in ("1+1", "问" * 30)], Sampling(max_new_tokens=6)
    answer = checkpoint.answerer(trained)
    alone = [answer([turns], greedy)[0] for turns in asked]
    assert answer(asked, greedy) == alone
    folder = tmp_path / "whole"
    checkpoint.recipe("export").main(["--model_save_dir", str(trained), "--output_dir", str(folder)])
    assert not AutoConfig.from_pretrained(folder).tie_word_embeddings
    whole, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    with pytest.warns(UserWarning, match="tied layer is part of the adapter"):
        expected = logits_by_plain_peft(str(checkpoint.folder), trained)
    with torch.no_grad():
        torch.testing.assert_close(whole(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert (checkpoint.whole(input_ids=IDS).logits - expected).abs().max() > 0.01
