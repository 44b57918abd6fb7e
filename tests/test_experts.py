"""LoRA on experts whose weights share a tensor: trained without dropout, said, reloaded, exported, gone on from."""

import json

import pytest
import torch
import transformers
from runs import Family
from safetensors.torch import load_file

from common.config import TrainFlags
from common.errors import UserError
from common.model import loading
from common.training import tuning

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=16, tie_word_embeddings=False)
TOLD = "LoRA: 专家也训练 on experts too (down_proj, gate_up_proj)"
ALL = ["--target_modules", "all-linear", "--max_steps", 6, "--logging_steps", 1]


@pytest.fixture(scope="module")
def qwen(small_qwen, tmp_path_factory):
    """Qwen's recipes on a small Qwen3-MoE, whose first layer is dense."""
    parent = tmp_path_factory.mktemp("experts")
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_qwen)
    tokenizer.save_pretrained(parent / "base")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(vocab_size=len(tokenizer), mlp_only_layers=[0], **SIZES, **EXPERTS)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(parent / "base")
    return Family("qwen2_sft.ft_qwen2", parent / "base", parent)


@pytest.fixture(scope="module")
def folder(qwen):
    return qwen.train("first", *ALL)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "trainer_log.jsonl").read_text().splitlines()]


def test_experts_are_trained_without_dropout(qwen, folder):
    adapter = load_file(folder / "adapter_model.safetensors")
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapter if ".mlp." in name} == {
        "experts",
        "base_layer",
    }
    assert any(weight.abs().max() > 0 for name, weight in adapter.items() if "experts" in name and "lora_B" in name)
    config = json.loads((folder / "run_manifest.json").read_text())["config"]
    assert config["lora_dropout"] == 0
    assert losses(folder)[-1] < losses(folder)[0]
    card = (folder / "README.md").read_text()
    assert "vLLM serves no adapter with LoRA on experts" in card


def test_the_merged_model_is_the_tuned_one(qwen, folder, capsys):
    flags = ["--model_save_dir", str(folder), "--output_dir", str(folder.parent / "whole"), "--dtype", "float32"]
    qwen.recipe("export").main(flags)
    assert capsys.readouterr().out.count("greedy answers equal 8/8") == 2


def test_its_weights_are_trained_on_without_dropout(qwen, folder, capsys):
    again = qwen.train("again", "--adapter_name_or_path", folder, "--max_steps", 2, "--logging_steps", 1, data="other")
    assert TOLD in capsys.readouterr().out
    assert (
        load_file(again / "adapter_model.safetensors").keys() == load_file(folder / "adapter_model.safetensors").keys()
    )


def test_what_is_asked_for_is_kept_or_refused(qwen, capsys):
    base = loading.load_base(str(qwen.base), "float32")

    def fitted(*flags):
        return tuning.fit_targets(qwen.parse(TrainFlags, "--path_model_pretrain", qwen.base, *flags)[0], base)

    assert fitted("--target_modules", "all-linear").lora_dropout == 0
    assert capsys.readouterr().out.startswith(TOLD)
    assert fitted("--target_modules", "all-linear", "--lora_dropout", 0).lora_dropout == 0
    assert fitted("--lora_dropout", 0.1).lora_dropout == 0.1, "attention alone"
    assert fitted("--tuning", "full").lora_dropout > 0 and not capsys.readouterr().out
    with pytest.raises(UserError, match="--lora_dropout 0.1: .*down_proj, gate_up_proj.*: --lora_dropout 0, or"):
        fitted("--target_modules", "all-linear", "--lora_dropout", 0.1)
