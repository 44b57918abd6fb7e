"""Models of images or sound too: their text model is trained, scored, asked, served and exported; each small, random.

The checkpoints are written by transformers' own classes, towers and all.
"""

import importlib
import json
import shutil

import pytest
import torch
import transformers
from conftest import CHARACTERS
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.cli import parse
from common.config import PredictFlags
from common.conversation.turns import Turn
from common.engine import batcher as engine
from common.engine.kv_batch import KVBatch, new_cache
from common.engine.request import Ask
from common.errors import UserError
from common.inference.answerer import Sampling
from common.model import loading
from common.model.loss import supervised
from common.training import packing, tuning
from qwen2_sft.ft_qwen2.config import Config as QwenConfig

TEXT = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
TEXT |= dict(intermediate_size=64, max_position_embeddings=1024)
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
LINEAR |= dict(layer_types=["linear_attention"] * 3 + ["full_attention"])
ROTARY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
LINEAR |= {"rope_parameters": ROTARY | {"mrope_interleaved": True}}
EXPERTS = dict(moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
VISUAL = dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32)
EAR = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, subsampling_conv_channels=[8, 8])
PATCHES = dict(patch_size=2, pooling_kernel_size=2, mm_embed_dim=32, mm_posemb_size=16, output_proj_dims=32)
MODELS = {  # class: (family, text config, the others)
    "Gemma3": (
        "gemma",
        TEXT | SLIDING,
        {"vision_config": TOWER | {"image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4},
    ),
    "Gemma4": (
        "gemma",
        TEXT | SLIDING | {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "global_head_dim": 32},
        {
            "vision_config": TOWER | {"head_dim": 16, "num_key_value_heads": 2, "patch_size": 4},
            "audio_config": EAR | {"output_proj_dims": 32},
        },
    ),
    "Gemma4Unified": (
        "gemma",
        TEXT | SLIDING | {"global_head_dim": 32},
        {"vision_config": PATCHES, "audio_config": {"output_proj_dims": 32}},
    ),
    "Qwen3_5": ("qwen", TEXT | LINEAR, {"vision_config": VISUAL, "tie_word_embeddings": True}),
    "Qwen3_5Moe": (
        "qwen",
        {name: value for name, value in (TEXT | LINEAR | EXPERTS).items() if name != "intermediate_size"},
        {"vision_config": VISUAL},
    ),
}
PARTS = {
    "Gemma3": "vision_tower, multi_modal_projector",
    "Gemma4": "vision_tower, audio_tower, embed_vision, embed_audio",
    "Gemma4Unified": "embed_vision, embed_audio",
    "Qwen3_5": "visual",
    "Qwen3_5Moe": "visual",
}
RECIPES = {"gemma": "gemma_sft.ft_gemma", "qwen": "qwen2_sft.ft_qwen2"}
QUESTIONS = [[Turn("user", text)] for text in ("1+1", "问" * 40, "有在他" * 5, "3+4", "他是不有的" * 9)]
IDS = (torch.arange(2 * 24).view(2, 24) * 7) % 90 + 5


class Checkpoint:
    """One of MODELS: its folder, the model whose weights are in it, and its family's recipes."""

    def __init__(self, name, folder, tokenizer):
        self.name, self.folder = name, folder
        self.family, text, others = MODELS[name]
        rows = {"vocab_size": len(tokenizer)}
        rows |= {"vocab_size_per_layer_input": len(tokenizer)} if name == "Gemma4" else {}
        config = getattr(transformers, f"{name}Config")(text_config=text | rows, **others)
        torch.manual_seed(0)
        self.whole = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
        self.whole.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def recipe(self, name):
        return importlib.import_module(f"{RECIPES[self.family]}.{name}")

    def train(self, parent, *more):
        """The folder of a run of a few steps on sums."""
        rows = [{"query": f"{n}+{n * 7 % 50}", "response": str(n + n * 7 % 50) * (1 + n % 4)} for n in range(40)]
        (parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ["--path_model_pretrain", self.folder, "--data_path", parent / "rows.jsonl"]
        flags += ["--model_save_dir", parent / "out", "--cache_dir", parent / "cache", "--learning_rate", 0.01]
        self.recipe("train").main([str(flag) for flag in [*flags, "--logging_steps", 1, *more]])
        return parent / "out"

    def answerer(self, folder):
        flags = ["--model_save_dir", str(folder), "--path_model_pretrain", str(self.folder)]
        return self.recipe("predict").load_answer(parse(self.recipe("config").Config, PredictFlags, flags)[0])


def make(name, folder, gemma_tokenizer):
    """The Checkpoint of that name."""
    from qwen2_sft.make_embedded import make_tokenizer

    return Checkpoint(name, folder, gemma_tokenizer if MODELS[name][0] == "gemma" else make_tokenizer(CHARACTERS))


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory, tokenizer):
    return make(request.param, tmp_path_factory.mktemp(request.param), tokenizer)


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """The folder of a run that scored two held-out rows too."""
    return checkpoint.train(
        tmp_path_factory.mktemp("run"),
        "--max_steps",
        8,
        "--eval_rows",
        2,
        "--max_new_tokens",
        4,
        "--micro_batch_size",
        4,
    )


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, tokenizer):
    return make("Qwen3_5", tmp_path_factory.mktemp("qwen3_5"), tokenizer)


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory, tokenizer):
    return make("Gemma3", tmp_path_factory.mktemp("gemma3"), tokenizer)


# ---------------------------------------------------------------- the whole road


def test_the_text_model_has_the_loss_of_the_whole(checkpoint, capsys):
    net = loading.load_base(checkpoint.folder, "float32")
    told = capsys.readouterr().err
    assert f"left out: {PARTS[checkpoint.name]} (" in told and told.count("left out") == 1
    assert type(net).__name__ == f"{checkpoint.name}ForCausalLM"
    left = sum(p.numel() for p in checkpoint.whole.parameters()) - sum(p.numel() for p in net.parameters())
    assert f"({left:,} " in told
    labels = IDS.clone()
    labels[:, :8] = -100
    with torch.no_grad():
        expected = checkpoint.whole(input_ids=IDS, labels=labels)
        assert torch.equal(net(input_ids=IDS).logits, expected.logits)
        with supervised(net):
            found = net(input_ids=IDS, labels=labels, num_items_in_batch=(labels[:, 1:] != -100).sum())
    torch.testing.assert_close(found.logits.sum(0)[0] / found.logits.sum(0)[1], expected.loss, rtol=1e-5, atol=1e-5)


def test_it_learns_in_every_layer(checkpoint, trained):
    log = [json.loads(line)["loss"] for line in (trained / "trainer_log.jsonl").read_text().splitlines()]
    assert log[-1] < log[0]
    names = load_file(trained / "adapter_model.safetensors").keys()
    assert {name.split(".layers.")[1].split(".")[0] for name in names} == {"0", "1", "2", "3"}
    assert all(name.startswith("base_model.model.model.layers.") for name in names)
    taken = json.loads((trained / "run_manifest.json").read_text())["config"]["target_modules"]
    assert taken == (["q_proj", "k_proj", "v_proj"] if checkpoint.family == "gemma" else ["all-linear"])
    assert json.loads((trained / "all_results.json").read_text())["tuned"]


def test_answers_do_not_depend_on_who_else_asks(checkpoint, trained, monkeypatch):
    """One by one, in one batch, and in the service, which reads long prompts in parts while others are under way."""
    monkeypatch.setattr(engine, "CHUNK", 16)
    answer, greedy = checkpoint.answerer(trained), Sampling(max_new_tokens=12)
    alone = [answer([turns], greedy)[0] for turns in QUESTIONS]
    assert answer(QUESTIONS, greedy) == alone
    batcher = engine.Batcher(answer, {"tuned": "default"}, slots=3)
    asks = [Ask(batcher.encoder.whole_ids(turns), Sampling(max_new_tokens=n + 8)) for n, turns in enumerate(QUESTIONS)]
    tickets = [batcher.submit("tuned", [ask]) for ask in asks]
    found = [[row.ids for row in ticket.rows] for ticket in tickets if list(ticket.parts())]
    batcher.close()
    for ask, (ids,) in zip(asks, found, strict=True):
        (expected,) = answer.generate([ask.ids], ask.sampling)
        assert ids == expected[: len(ids)] and len(ids) >= len(expected) - 1, "a stop id is not part of an answer"


def test_it_is_exported_as_a_model_of_text_alone(checkpoint, trained, tmp_path):
    folder = tmp_path / "merged"
    checkpoint.recipe("export").main(["--model_save_dir", str(trained), "--output_dir", str(folder)])
    config = AutoConfig.from_pretrained(folder)
    assert config.get_text_config() is config and config.architectures == [f"{checkpoint.name}ForCausalLM"]
    plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert all(name.startswith(("model.", "lm_head.")) for name in load_file(folder / "model.safetensors"))
    assert not any("language_model" in name for name in load_file(folder / "model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=IDS).logits, logits_by_plain_peft(checkpoint, trained))


def logits_by_plain_peft(checkpoint, folder):
    """Of IDS, as docs/models.md loads a run without this project."""
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(checkpoint.folder)
    text = AutoConfig.from_pretrained(base).text_config
    text.tie_word_embeddings = AutoConfig.from_pretrained(base).tie_word_embeddings
    names = {r"^language_model\.model\.": "model.", r"^model\.language_model\.": "model."}
    net, info = AutoModelForCausalLM.from_pretrained(base, config=text, key_mapping=names, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        return PeftModel.from_pretrained(net, folder)(input_ids=IDS).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_rows_are_apart_or_refused(checkpoint, dtype):
    """The state of linear attention goes on from one row to the next: by 2 %, which bfloat16's rounding would hide."""
    net = loading.load_base(checkpoint.folder, dtype)
    rows = [{"input_ids": (IDS[n % 2, : 24 - 5 * n] + n).tolist(), "where": "f"} for n in range(3)]
    rows = [row | {"labels": row["input_ids"]} for row in rows]
    if checkpoint.family == "gemma":
        packing.check_apart(net, FakePacks([rows]), getattr(torch, dtype))
    else:
        with pytest.raises(UserError, match="--packing: 样本互相可见 rows see each other"):
            packing.check_apart(net, FakePacks([rows]), getattr(torch, dtype))


class FakePacks(list):
    packs = property(list)

    def __getitems__(self, numbers):
        return [self[number] for number in numbers]


# ---------------------------------------------------------------- what else is tuned and loaded


@pytest.mark.parametrize("name", ["Gemma3", "Qwen3_5", "Qwen3_5Moe"])
def test_a_whole_model_is_saved_by_the_names_of_text_alone(name, tmp_path, tokenizer):
    checkpoint = make(name, tmp_path / "base", tokenizer)
    out = checkpoint.train(tmp_path, "--tuning", "full", "--max_steps", 2, "--eval_rows", 0)
    plain, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()) and type(plain).__name__ == f"{name}ForCausalLM"
    assert checkpoint.answerer(out)([QUESTIONS[0]], Sampling(max_new_tokens=2))


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
