"""What older readers look for in an exported folder: written with it, and added to folders exported before."""

import importlib
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GemmaConfig, Qwen2Config, Qwen3Config

from common.errors import UserError
from common.export import older

RECIPES = ["gemma_sft.ft_gemma", "qwen2_sft.ft_qwen2", "chatglm_sft.ft_chatglm"]
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512}
LINEAR = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
GEMMA3 = {"rope_local_base_freq": 1e4, "sliding_window_pattern": 3}
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "head_dim": 16}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "sliding_window": 8}


def default(theta):
    return {"rope_type": "default", "rope_theta": theta}


@pytest.mark.parametrize(
    ("kind", "options", "keys"),
    [
        (GemmaConfig, {"rope_parameters": default(3e4)}, {"rope_theta": 3e4}),
        (Qwen2Config, {"rope_parameters": default(1e4)}, {"rope_theta": 1e4}),
        (Qwen3Config, {"rope_parameters": YARN}, {"rope_theta": 1e6, "rope_scaling": {**YARN, "rope_theta": ...}}),
        (Gemma3TextConfig, {"sliding_window_pattern": 3}, {"rope_theta": 1e6} | GEMMA3),
        (
            Gemma3TextConfig,
            {"sliding_window_pattern": 3, "rope_parameters": LINEAR},
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}} | GEMMA3,
        ),
    ],
)
def test_the_keys_are_there_and_transformers_computes_the_same(kind, options, keys, tmp_path):
    """Of a checkpoint that has none of them; rope_scaling is without the rope_theta beside it."""
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(kind(**SIZES, **options)).eval()
    net.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    plain = json.loads(file.read_text())
    plain = {name: value for name, value in plain.items() if name not in keys}
    file.write_text(json.dumps(plain))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert older.complete(tmp_path, str(tmp_path)) == [f"config.json:{name}" for name in keys]
    found = json.loads(file.read_text())
    scaling = {name: value for name, value in keys.get("rope_scaling", {}).items() if value is not ...}
    assert {name: found[name] for name in keys} == keys | ({"rope_scaling": scaling} if scaling else {})
    assert {name: found[name] for name in plain} == plain
    ids = torch.arange(40)[None] % 64
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(again(ids).logits, net(ids).logits)


def test_a_pattern_that_is_not_regular_has_no_number():
    layers = 2 * ["sliding_attention", "full_attention"] + ["full_attention"]
    config = {"rope_parameters": LINEAR, "layer_types": layers}
    assert "sliding_window_pattern" not in older.older_keys(config)
    assert "sliding_window_pattern" not in older.older_keys(config | {"layer_types": 2 * ["sliding_attention"]})


@pytest.fixture
def folder(tmp_path):
    """An export of before: the embedded base without older keys, its template in a file of its own alone."""
    base = importlib.import_module("gemma_sft.ft_gemma.config").Config.EMBEDDED_DIR
    place = tmp_path / "whole"
    shutil.copytree(base, place)
    settings = json.loads((place / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copytree(base, tmp_path / "base")
    (place / "export.json").write_text(json.dumps({"base": {"path": str(tmp_path / "base")}}))
    return place


@pytest.mark.parametrize("family", RECIPES)
def test_a_folder_of_before_is_repaired(family, folder, capsys):
    """By any of the recipes; a second time there is nothing to do."""
    (folder.parent / "base/tokenizer.model").write_bytes(b"pieces")
    for _ in range(2):
        importlib.import_module(f"{family}.export").main(["--repair", str(folder)])
    first, second = capsys.readouterr().out.splitlines()
    added = "config.json:rope_theta, tokenizer_config.json:chat_template, tokenizer.model"
    assert first == f"{folder}: 补上 added {added}" and second.endswith("nothing is missing")
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert template == (folder / "chat_template.jinja").read_text()
    assert (folder / "tokenizer.model").read_bytes() == b"pieces"


def test_pieces_of_another_vocabulary_are_not_taken(folder, capsys):
    qwen = importlib.import_module("qwen2_sft.ft_qwen2.config").Config.EMBEDDED_DIR
    base = folder.parent / "base"
    shutil.rmtree(base)
    shutil.copytree(qwen, base)
    (base / "tokenizer.model").write_bytes(b"pieces")
    older.repair(str(folder))
    assert not (folder / "tokenizer.model").exists()
    assert "tokenizer.model: 基座没有，或词表不同 the base" in capsys.readouterr().out


def test_another_folder_is_not_touched(folder):
    (folder / "export.json").unlink()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="not a folder of export.py"):
        older.repair(str(folder))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
