"""Models of images or sound too: which weights are theirs, how the text model is saved, quantised and served.

Their whole road is in test_classes.py.
"""

import importlib
import json
import shutil

import pytest
import torch
import transformers
from classes import IDS, Checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.conversation.turns import Turn
from common.engine.kv_batch import KVBatch
from common.errors import UserError
from common.inference.answerer import Sampling
from common.inference.cache import new_cache
from common.model import loading
from common.training import tuning
from qwen2_sft.ft_qwen2.config import Config as QwenConfig


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return Checkpoint("Qwen3_5ForConditionalGeneration", tmp_path_factory.mktemp("qwen3_5"))


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    return Checkpoint("Gemma3ForConditionalGeneration", tmp_path_factory.mktemp("gemma3"))


# ---------------------------------------------------------------- what else is tuned and loaded


@pytest.mark.parametrize("name", ["Gemma3", "Qwen3_5", "Qwen3_5Moe"])
def test_a_whole_model_is_saved_by_the_names_of_text_alone(name, tmp_path):
    checkpoint = Checkpoint(f"{name}ForConditionalGeneration", tmp_path / "base")
    scored = ["--val_set_size", 4, "--eval_rows", 2, "--max_new_tokens", 4, "--sample_rows", 0]
    out = checkpoint.train(tmp_path, "--tuning", "full", "--max_steps", 2, *scored)
    assert json.loads((out / "all_results.json").read_text())["tuned"]
    plain, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()) and type(plain).__name__ == f"{name}ForCausalLM"
    assert checkpoint.answerer(out)([[Turn("user", "1+1")]], Sampling(max_new_tokens=2))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_text_model_is_quantised_alone(gemma3, bits):
    net = loading.load_base(gemma3.folder, "float32", bits)
    assert "bit" in type(net.model.layers[0].self_attn.q_proj).__name__
    with torch.no_grad():
        assert net(input_ids=IDS).logits.isfinite().all()


def rewritten(checkpoint, folder, change):
    """A copy of its folder with `change(weights)` done to its weights."""
    shutil.copytree(checkpoint.folder, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["language_model.model.layers.0.more", "more.weight", "vision_towers.weight"])
def test_a_weight_of_no_part_is_refused(gemma3, tmp_path, name):
    folder = rewritten(gemma3, tmp_path / "base", lambda weights: weights.update({name: torch.ones(2)}))
    with pytest.raises(UserError, match="1 多余 unexpected, e.g. "):
        loading.load_base(folder, "float32")


def test_a_lost_weight_of_the_text_model_is_refused_and_a_lost_tower_is_none(gemma3, tmp_path):
    folder = rewritten(gemma3, tmp_path / "base", lambda weights: weights.pop("language_model.model.norm.weight"))
    with pytest.raises(UserError, match="1 缺少 missing, e.g. model.norm.weight"):
        loading.load_base(folder, "float32")
    folder = rewritten(
        gemma3, tmp_path / "other", lambda weights: weights.pop("multi_modal_projector.mm_input_projection_weight")
    )
    assert loading.load_base(folder, "float32").num_parameters()


def test_a_text_model_that_cannot_stand_alone_is_refused(tmp_path):
    transformers.Qwen3VLConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a model of text alone .qwen3_vl., and its text model .qwen3_vl_text."):
        loading.load_base(tmp_path, "float32")


# ---------------------------------------------------------------- linear attention


def test_rows_join_and_leave_with_their_states(qwen):
    """Logits of three rows, read in parts and joined, one of which leaves, are those of each row alone."""
    net = loading.load_base(qwen.folder, "float32")
    prompts = [IDS[0, :20].tolist(), IDS[1, :3].tolist(), IDS[0, 5:16].tolist()]
    more = [[7, 8, 9], [9, 7, 8], [5, 6, 7]]
    with torch.inference_mode():
        first, late = KVBatch(net, "ab", prompts[:2], 0), KVBatch(net, "c", prompts[2:], 0)
        found = [read_in_parts(first, 6)[0], None, read_in_parts(late, 6)[0]]
        assert_alone(net, prompts, found)
        first.join(late)
        assert_alone(net, [[*ids, new[0]] for ids, new in zip(prompts, more, strict=True)], first.step([7, 9, 5]))
        first.keep([1, 2])
        assert first.rows == ["b", "c"] and first.mask.shape[1] == len(prompts[2]) + 1
        found = first.step([7, 6])
        assert_alone(net, [[*ids, *new[:2]] for ids, new in zip(prompts[1:], more[1:], strict=True)], found)


def read_in_parts(batch, most):
    while (logits := batch.prefill(most)) is None:
        pass
    return logits


def assert_alone(net, rows, logits):
    """Of each row (a list of ids) that has some: the logits after it are the net's own."""
    for ids, found in zip(rows, logits, strict=True):
        if found is not None:
            torch.testing.assert_close(found, net(input_ids=torch.tensor([ids])).logits[0, -1], rtol=1e-4, atol=1e-5)


def test_what_rows_cannot_share_is_refused_by_name(qwen):
    config = AutoConfig.from_pretrained(qwen.folder).text_config
    config.layer_types, config.sliding_window = ["hybrid_sliding"] * 4, 8
    with pytest.raises(
        UserError, match="qwen3_5_text.*cannot batch rows.*LinearAttentionAndSlidingWindowAttentionLayer"
    ):
        new_cache(config)


def test_targets_that_miss_layers_are_told_and_the_users_are_kept(qwen, capsys):
    base, own = loading.load_base(qwen.folder, "float32"), QwenConfig()
    assert tuning.reach_all(own, base).target_modules == ("all-linear",)
    told = "LoRA: q_proj k_proj v_proj: 4 层中只有 1 层有 in 1 of 4 layers only; "
    assert told + "改用 taken instead: --target_modules all-linear" in capsys.readouterr().out
    asked = QwenConfig(given=frozenset({"target_modules"}))
    assert tuning.reach_all(asked, base) is asked
    assert told + "--target_modules all-linear 可到每一层 reaches all" in capsys.readouterr().out
    for other in (QwenConfig(target_modules=("o_proj", "out_proj")), QwenConfig(target_modules=("all-linear",))):
        assert tuning.reach_all(other, base) is other
    assert tuning.reach_all(own, base, parent=qwen.folder) is own and not capsys.readouterr().out


def test_the_tokenizer_is_the_folders_own(gemma3):
    prompt = importlib.import_module("gemma_sft.prompt")
    loaded = loading.load_tokenizer(gemma3.folder, prompt)
    assert loaded.get_vocab() == AutoTokenizer.from_pretrained(gemma3.folder).get_vocab()
