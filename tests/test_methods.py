"""Every tuning method on the embedded base: the loss falls, plain peft and transformers reload it, it is exported."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.cli import parse
from common.config import ExportFlags, PredictFlags, TrainFlags
from common.conversation import render
from common.conversation.turns import Turn
from common.errors import UserError
from common.export import proof
from common.inference.answerer import Sampling
from common.model import loading, loss, verify
from common.training import batches, callbacks, packing, report, trainer, tuning
from gemma_sft.ft_gemma.config import Config

# {recipes: the module that tells transformers about the family's model}; a family more is one entry more
FAMILIES = {
    "gemma_sft.ft_gemma": "",
    "qwen2_sft.ft_qwen2": "",
    "chatglm_sft.ft_chatglm": "chatglm_sft.models.chatglm",
}
METHODS = {
    "lora": [],
    "qlora 4 bit": ["--tuning", "qlora"],
    "qlora 8 bit": ["--tuning", "qlora", "--quantization_bit", 8],
    "dora": ["--use_dora"],
    "rslora": ["--use_rslora"],
    "pissa": ["--use_pissa"],
    "embeddings, head and norms": [
        *["--target_modules", "all-linear,all-embedding,lm_head"],
        *["--modules_to_save", "all-norm"],
    ],
    "token rows": ["--tuning", "qlora", "--train_template_tokens", "true"],
    "full": ["--tuning", "full"],
    "freeze": ["--tuning", "freeze", "--freeze_trainable_layers", 1],
}
FIRST = next(iter(FAMILIES))
CASES = [(family, method) for family in FAMILIES for method in METHODS]
QUESTION = [Turn("user", "类型#裙*颜色#黑色")]
DATA = Path(__file__).resolve().parents[1] / "data"
PLAIN = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
if sys.argv[2]:
    sys.path.insert(0, sys.argv[3])
    __import__(sys.argv[2])
four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
for base, folder, bits, ids in json.loads(sys.argv[1]):
    quantised = {4: four, 8: dict(load_in_8bit=True)}.get(bits)
    options = dict(quantization_config=BitsAndBytesConfig(**quantised)) if bits else {}
    model = AutoModelForCausalLM.from_pretrained(base or folder, dtype=torch.float32, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # see common/model/loading.py
            module.support_avx512bf16_for_cpu = False
    model = (PeftModel.from_pretrained(model, folder) if base else model).eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.tensor([ids])).logits, folder + "/plain.pt")
"""


def recipe(family, name):
    return importlib.import_module(f"{family}.{name}")


def train(family, folder, *more):
    """A short run of the family's train.py on its embedded base; each step's loss."""
    flags = ["--data_path", f"{DATA / 'product_train.jsonl'}#64", "--model_save_dir", folder, "--max_steps", 12]
    flags += ["--eval_data_path", DATA / "product_heldout.jsonl", "--eval_rows", 0, "--val_set_size", 0]
    flags += ["--micro_batch_size", 4, "--batch_size", 4, "--logging_steps", 3]
    flags += ["--cache_dir", folder.parent / "cache", *more]
    recipe(family, "train").main(list(map(str, flags)))
    return [json.loads(line)["loss"] for line in (folder / "trainer_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, warm):
    """{(family, method): (folder, losses, the trained model's logits, ids)}, each also reloaded by plain libraries."""
    parent, made, kept = tmp_path_factory.mktemp("runs"), {}, {}
    leave = report.leave

    def spy(work, net, tokenizer, results):
        prompt = importlib.import_module(f"{family.partition('.')[0]}.prompt")
        ids = render.prompt_ids(tokenizer, prompt, QUESTION, "chat", 100)[0]
        with torch.no_grad():
            kept[str(work.folder)] = (net.eval()(input_ids=torch.tensor([ids])).logits, ids)
        return leave(work, net, tokenizer, results)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "leave", spy)
        for number, (family, method) in enumerate(CASES):
            folder = parent / str(number)
            losses = train(family, folder, *METHODS[method])
            made[family, method] = (folder, losses, *kept[str(folder)])
    for family in FAMILIES:
        jobs = [job(run) for (whose, _), run in made.items() if whose == family]
        status, _, errors = warm.run(["-c", PLAIN, json.dumps(jobs), FAMILIES[family], DATA.parent], parent)
        assert status == 0, errors
    return made


def job(run):
    folder, _, _, ids = run
    config = json.loads((folder / "run_manifest.json").read_text())["config"]
    adapter = folder / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else ""
    return base, str(folder), config["quantization_bit"] * (config["tuning"] == "qlora"), ids


def answerer(family, folder):
    cfg, _ = parse(recipe(family, "config").Config, TrainFlags, ["--model_save_dir", str(folder)])
    return recipe(family, "predict").load_answer(cfg)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), CASES)
def test_it_learns_and_is_reloaded_alike(runs, family, method):
    folder, losses, trained, ids = runs[family, method]
    assert losses[-1] < 0.9 * losses[0], losses
    plain = torch.load(folder / "plain.pt", weights_only=True)
    answer = answerer(family, folder)
    with torch.no_grad():
        ours = answer.net(input_ids=torch.tensor([ids])).logits
    scale = trained.abs().max()
    assert (plain - ours).abs().max() <= 1e-6 * scale
    assert (ours - trained).abs().max() <= 1e-5 * scale, "what is loaded must be what was trained"


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), CASES)
def test_it_is_exported_with_its_self_test(runs, tmp_path, capsys, monkeypatch, family, method):
    monkeypatch.setattr(proof, "NEW_TOKENS", 8)
    folder = runs[family, method][0]
    recipe(family, "export").main(
        ["--model_save_dir", str(folder), "--output_dir", str(tmp_path / "whole"), "--dtype", "float32"]
    )
    printed = capsys.readouterr().out
    assert printed.count("greedy answers equal 8/8") == 2 and "done: 完整模型" in printed
    config = json.loads((tmp_path / "whole/config.json").read_text())
    base = json.loads((recipe(family, "config").Config.EMBEDDED_DIR / "config.json").read_text())
    untied = not base["tie_word_embeddings"] or method == "embeddings, head and norms"
    assert config["tie_word_embeddings"] is not untied and "quantization_config" not in config
    assert ("lm_head.weight" in load_file(tmp_path / "whole/model.safetensors")) == untied


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["lora", "qlora 4 bit", "full", None], ids=str)
def test_any_run_answers_quantised(runs, method, bits):
    """None: the base alone."""
    folder, _, trained, ids = runs[FIRST, method or "lora"]
    given = ["--model_save_dir", str(folder), "--quantization_bit", str(bits)]
    cfg, _ = parse(recipe(FIRST, "config").Config, PredictFlags, given)
    net = recipe(FIRST, "predict").load_answer(cfg, base=method is None).net
    quantised = {type(module).__name__ for module in net.modules() if "bit" in type(module).__name__}
    assert quantised == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    if method:
        with torch.no_grad():
            off = (net(input_ids=torch.tensor([ids])).logits - trained).abs().max() / trained.abs().max()
        assert (method == "qlora 4 bit" and bits == 4) == (off <= 1e-5) and off < 0.8


@pytest.mark.slow
def test_dora_does_not_answer_in_8_bits(runs):
    given = ["--model_save_dir", str(runs[FIRST, "dora"][0]), "--quantization_bit", "8"]
    cfg, _ = parse(recipe(FIRST, "config").Config, PredictFlags, given)
    with pytest.raises(UserError, match="--use_dora 与 --quantization_bit 8 不能同用"):
        recipe(FIRST, "predict").load_answer(cfg)


SERVED = "只有线性层的 LoRA, an engine that takes LoRA for this model can serve it beside its base"


@pytest.mark.slow
def test_what_is_saved_says_what_it_is_and_how_it_is_served(runs):
    def card(method):
        folder = runs[FIRST, method][0]
        serving = json.loads((folder / "all_results.json").read_text())["serving"]
        text = (folder / "README.md").read_text()
        assert f"Serving: {serving}." in text
        return text.split("\n# ")[1].split(" `")[0], serving, text

    assert card("lora")[:2] == ("LoRA adapter for", SERVED)
    assert card("rslora")[:2] == ("rsLoRA adapter for", SERVED)
    assert card("pissa")[:2] == ("PiSSA adapter for", SERVED)
    title, serving, text = card("qlora 4 bit")
    assert (title, serving) == (
        "LoRA adapter for the 4-bit",
        SERVED,
    ) and "load_in_4bit=True, bnb_4bit_quant_type" in text
    title, serving, _ = card("dora")
    assert title == "DoRA adapter for" and serving.endswith("vLLM serves no adapter with DoRA")
    assert card("embeddings, head and norms")[1].endswith("with modules_to_save, LoRA on embeddings or head")
    title, serving, text = card("full")
    assert title == "All weights tuned:" and "a whole model" in serving and "PeftModel" not in text
    assert card("freeze")[0] == "The last 1 layers tuned:"


@pytest.mark.slow
def test_each_method_trains_what_it_says(runs):
    def results(method):
        return json.loads((runs[FIRST, method][0] / "all_results.json").read_text())

    lora, full = results("lora"), results("full")
    assert full["trainable_params"] == full["all_params"] == lora["all_params"] - lora["trainable_params"]
    assert results("rslora")["trainable_params"] == results("pissa")["trainable_params"] == lora["trainable_params"]
    assert results("qlora 4 bit")["all_params"] == results("qlora 8 bit")["all_params"] == lora["all_params"]
    assert lora["trainable_params"] < results("dora")["trainable_params"]
    assert 0 < results("freeze")["trainable_params"] < full["trainable_params"] / 2
    one = json.loads((runs[FIRST, "pissa"][0] / "adapter_config.json").read_text())
    assert (one["r"], one["lora_alpha"], one["init_lora_weights"]) == (32, 64, True), "plain LoRA of twice the rank"
    names = load_file(runs[FIRST, "embeddings, head and norms"][0] / "adapter_model.safetensors").keys()
    assert not [name for name in names if "base_layer" in name], "the base's own embeddings are not copied"
    assert {"lora_embedding_A", "lora_embedding_B"} <= {name.rpartition(".")[2] for name in names}
    assert [name for name in names if "lm_head" in name] and [name for name in names if "norm" in name]


@pytest.mark.slow
def test_base_and_tuned_answers_of_a_whole_model(runs):
    """--compare, where there is no adapter to switch off: the base is loaded beside the tuned model."""
    answer = answerer(FIRST, runs[FIRST, "full"][0])
    asked, greedy = [QUESTION], Sampling(max_new_tokens=12)
    base = answerer(FIRST, runs[FIRST, "lora"][0])(asked, greedy, base=True)
    assert answer.base_net is None, "not before it is asked for"
    assert answer(asked, greedy, base=True) == base != answer(asked, greedy)


# --- on a small random model ---


@pytest.fixture
def cfg(small_gemma, tmp_path):
    """cfg(*flags): a Config of a run on the small Gemma into tmp_path/out."""

    def make(*flags):
        given = ["--path_model_pretrain", small_gemma, "--model_save_dir", tmp_path / "out", *flags]
        return parse(Config, None, list(map(str, given)))

    return make


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"query": f"{n}+{n * 7 % 50}", "response": str(n + n * 7 % 50) * (1 + n % 4)} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def fit(small_gemma, rows_file, tmp_path):
    """fit(name, *flags): a run of train.py into tmp_path/name."""

    def run(name, *flags):
        given = ["--path_model_pretrain", small_gemma, "--data_path", rows_file, "--model_save_dir", tmp_path / name]
        given += ["--eval_rows", 0, "--cache_dir", tmp_path / "cache", "--val_set_size", 0]
        given += [] if "full" in flags else ["--lora_dropout", 0]
        recipe("gemma_sft.ft_gemma", "train").main(list(map(str, [*given, *flags])))
        return tmp_path / name

    return run


def base(cfg):
    return loading.load_base(cfg.base, cfg.dtype, cfg.bits)


def test_words_for_modules(cfg, small_gemma):
    net = base(cfg())
    assert tuning.named(net, ("all-norm",)) == ["input_layernorm", "norm", "post_attention_layernorm"]
    assert tuning.named(net, ("all-embedding", "lm_head")) == ["embed_tokens", "lm_head"]
    every = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert tuning.named(net, ("all-linear", "q_proj")) == every
    with pytest.raises(UserError, match="w_proj: 没有这个模块 no such module"):
        tuning.named(net, ("q_proj", "w_proj"))
    with pytest.raises(UserError, match="--target_modules all-norm: .*not supported"):
        tuning.make_trainable(net, cfg("--target_modules", "all-norm"))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_pissa_takes_linear_layers_only(cfg, target):
    given = cfg("--use_pissa", "--target_modules", f"q_proj,{target}")
    with pytest.raises(UserError, match=f"--use_pissa: {target} 不是线性层或是输出层"):
        tuning.make_trainable(base(given), given)


def test_pissa_splits_the_base_and_gives_it_back(cfg):
    given = cfg("--use_pissa", "--use_rslora", "--lora_r", 8, "--modules_to_save", "all-norm")
    plain = base(given)
    ids = torch.tensor([[2, 5, 290, 291, 6, 264, 5, 280]])
    before = {name: w.clone() for name, w in plain.named_parameters()}
    expected = plain(input_ids=ids).logits
    net = tuning.make_trainable(plain, given).eval()
    start = tuning.start_of(net, given)
    layer = "model.layers.0.self_attn.q_proj"
    assert not torch.allclose(net.get_base_model().get_submodule(layer).base_layer.weight, before[f"{layer}.weight"])
    torch.testing.assert_close(net(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.ones_like(parameter) if "norm" in name else parameter)
    trained = net(input_ids=ids).logits
    tuning.settle(net, given, start)
    torch.testing.assert_close(net(input_ids=ids).logits, trained, rtol=1e-4, atol=1e-5)
    with net.disable_adapter():
        torch.testing.assert_close(net(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert not (Path(given.model_save_dir) / tuning.PISSA_START).exists()


def test_pissa_that_would_start_elsewhere_is_not_resumed(cfg):
    given = cfg("--use_pissa", "--lora_r", 8)
    for _ in range(2):  # the second time as a resumed run does
        tuning.start_of(tuning.make_trainable(base(given), given), given)
    other = cfg("--use_pissa", "--lora_r", 8, "--seed", 7, "--dtype", "float32")
    net = base(other)
    net.model.layers[0].self_attn.q_proj.weight.data.mul_(1.5)
    net = tuning.make_trainable(net, other)
    with pytest.raises(UserError, match="starts elsewhere than the run to be resumed"):
        tuning.start_of(net, other)


def test_freezing_more_layers_than_there_are(cfg):
    given = cfg("--tuning", "freeze", "--freeze_trainable_layers", 3)
    with pytest.raises(UserError, match="--freeze_trainable_layers 3: 模型只有 the model has only 2 layers"):
        tuning.make_trainable(base(given), given)


@pytest.mark.parametrize("flags", [["--tuning", "full"], ["--modules_to_save", "all-norm"]], ids=" ".join)
def test_a_bf16_base_is_trained_in_fp32_and_saved_in_bf16(cfg, flags):
    given = cfg("--dtype", "bfloat16", *flags)
    net = tuning.make_trainable(base(given), given)
    start = tuning.start_of(net, given)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    with torch.no_grad():
        next(iter(trained.values())).add_(1.0)
    tuning.settle(net, given, start)
    assert {p.dtype for name, p in trained.items() if "lora_" not in name} == {torch.bfloat16}
    assert torch.isfinite(net(input_ids=torch.tensor([[2, 5, 6]])).logits).all()


@pytest.mark.parametrize("flags", [["--modules_to_save", "lm_head"], ["--tuning", "freeze"]], ids=["head", "layers"])
def test_over_a_bf16_base_whole_modules_are_trained_and_asked(small_gemma, rows_file, tmp_path, capsys, flags):
    """The memory is tried, answers are sampled, and a checkpoint is saved, while the modules are fp32."""
    given = ["--path_model_pretrain", small_gemma, "--data_path", rows_file, "--model_save_dir", tmp_path / "out"]
    given += ["--eval_rows", 0, "--val_set_size", 3, "--max_new_tokens", 2, "--cache_dir", tmp_path / "cache"]
    given += ["--dtype", "bfloat16", "--max_steps", 2, "--save_steps", 1, *flags]
    recipe("gemma_sft.ft_gemma", "train").main(list(map(str, given)))
    assert len((tmp_path / "out/samples.jsonl").read_text().splitlines()) == 2 * 3
    capsys.readouterr()
    given = ["--model_save_dir", tmp_path / "out", "--checkpoint", 1, "--dtype", "bfloat16", "--query", "1+1"]
    recipe("gemma_sft.ft_gemma", "predict").main(list(map(str, given)))
    assert capsys.readouterr().out.strip()


def test_steps_that_are_lost_in_rounding_are_refused(cfg):
    given = cfg("--tuning", "full", "--dtype", "bfloat16")
    net = tuning.make_trainable(base(given), given)
    start = tuning.start_of(net, given)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1 + 1e-4)
    with pytest.raises(UserError, match="nothing was learned: no trained weight differs .* torch.bfloat16"):
        tuning.settle(net, given, start)


def test_a_whole_model_that_was_not_saved_right_is_refused(cfg, tmp_path):
    net = base(cfg())
    net.save_pretrained(tmp_path)
    verify.verify_whole(net, tmp_path)
    net.model.norm.weight.data[0] += 1
    with pytest.raises(UserError, match="1 不同 different, 0 缺少 missing, e.g. model.norm.weight"):
        verify.verify_whole(net, tmp_path)
    net.config.tie_word_embeddings = False
    net.lm_head.weight = torch.nn.Parameter(net.lm_head.weight.clone())
    with pytest.raises(UserError, match="1 不同 different, 1 缺少 missing, e.g. lm_head.weight"):
        verify.verify_whole(net, tmp_path)


def test_without_bitsandbytes_the_remedy_is_named(cfg, monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--tuning qlora 需要 needs bitsandbytes: pip install"):
        base(cfg("--tuning", "qlora"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--use_pissa"],
        ["--tuning", "full"],
        ["--target_modules", "q_proj,embed_tokens"],
        ["--train_template_tokens", "true", "--use_dora", "--neftune_noise_alpha", 5],
    ],
)
def test_every_method_resumes_bit_for_bit(fit, monkeypatch, flags):
    whole = fit("whole", *flags, "--max_steps", 6, "--save_steps", 3, "--learning_rate", 0.01)

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(callbacks.WholeCheckpoints, "on_step_begin", stop, raising=False)
        fit("stopped", *flags, "--max_steps", 6, "--save_steps", 3, "--learning_rate", 0.01)
    stopped = fit("stopped", *flags, "--max_steps", 6, "--save_steps", 3, "--learning_rate", 0.01)
    name = "model.safetensors" if "full" in flags else "adapter_model.safetensors"
    first, second = load_file(whole / name), load_file(stopped / name)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# --- packing ---


def test_packs_are_full_and_hold_each_row_once():
    assert packing.pack([6, 5, 4, 3, 2], 10, seed=0) == [[0, 2], [1, 3, 4]]
    lengths = [(n * 37) % 100 + 1 for n in range(1000)]
    packs = packing.pack(lengths, 128, seed=1)
    assert sorted(row for pack in packs for row in pack) == list(range(1000))
    sizes = [sum(lengths[row] for row in pack) for pack in packs]
    assert max(sizes) == 128 and sum(sizes) / (128 * len(packs)) > 0.98
    assert packs == packing.pack(lengths, 128, seed=1) != packing.pack(lengths, 128, seed=2)


def test_a_pack_as_tensors():
    rows = [
        {"input_ids": [2, 7, 9], "labels": [-100, 7, 9], "where": "f:1"},
        {"input_ids": [2, 8], "labels": [-100, 8], "where": "f:2"},
        {"input_ids": [2, 6, 6, 1], "labels": [-100, -100, 6, 1], "where": "f:3"},
    ]
    batch = batches.collate([rows[:2], rows[2:]], pad_id=0)
    assert batch["input_ids"].tolist() == [[2, 7, 9, 2, 8], [2, 6, 6, 1, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch["labels"].tolist() == [[-100, 7, 9, -100, 8], [-100, -100, 6, 1, -100]]
    assert batch["tokens"] == 9 and batch["where"] == ["f:1", "f:2", "f:3"]
    assert "attention_mask" not in batch


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_computed_as_asked(family, tmp_path, monkeypatch):
    seen = []
    load_whole = loading.load_whole
    monkeypatch.setattr(loading, "load_whole", lambda *args, **more: seen.append(load_whole(*args, **more)) or seen[-1])
    words = ["--model_save_dir", str(tmp_path), "--attn_implementation", "eager"]
    recipe(family, "train").main([*words, "--print_targets"])
    cfg = parse(recipe(family, "config").Config, None, words)
    recipe(family, "predict").load_answer(cfg, base=True)
    assert [net.config._attn_implementation for net in seen] == ["eager", "eager"]
    assert loading.load_base(cfg.base, "float32").config._attn_implementation == "sdpa"


def test_flash_attention_that_cannot_be_had_is_one_line(small_gemma, monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="flash_attention_2 需要 needs flash-attn: pip install flash-attn"):
        loading.load_base(small_gemma, "bfloat16", attention="flash_attention_2")
    with pytest.raises(UserError, match="does not compute in float32: --dtype bfloat16"):
        loading.load_base(small_gemma, "float32", attention="flash_attention_2")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gemma_sft.ft_gemma", "qwen2_sft.ft_qwen2"])
def test_packed_rows_have_the_loss_they_have_alone(family, attention):
    net = loading.load_base(recipe(family, "config").Config.EMBEDDED_DIR, "float32")
    net.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(300, 1800, (length,), generator=generator).tolist() for length in (40, 7, 23, 1, 30)]
    rows = [{"input_ids": row, "labels": [-100, *row[1:]], "where": "f"} for row in ids]
    with torch.no_grad(), loss.supervised(net):
        alone = torch.cat([logits(net, packing.collate([[row]], 0)) for row in rows])
        together = logits(net, packing.collate([rows[:3], rows[3:]], 0))
        unpacked = logits(net, batches.collate(rows, 0))
    torch.testing.assert_close(together.sum(0), alone.sum(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(unpacked, alone, rtol=1e-5, atol=1e-5)
    packing.check_apart(net, FakePacks([rows]), torch.float32)


class FakePacks(list):
    packs = property(list)

    def __getitems__(self, numbers):
        return [self[number] for number in numbers]


def logits(net, batch):
    """Each row's summed loss and counted ids."""
    return net(**{name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}).logits


def test_a_packed_step_is_the_unpacked_step(fit):
    """24 rows in one optimizer step: one forward pass a row, four rows a pass, or all of them in packs."""
    one = ["--max_steps", 1, "--learning_rate", 0.01]
    unpacked = fit("unpacked", *one, "--batch_size", 24)
    packed = fit(
        "packed",
        *one,
        "--packing",
        "--micro_batch_size",
        1,
        "--batch_size",
        64,
        "--max_length_q",
        64,
        "--max_length_a",
        36,
    )
    results = [json.loads((folder / "all_results.json").read_text()) for folder in (unpacked, packed)]
    assert results[0]["train_loss"] == pytest.approx(results[1]["train_loss"], rel=1e-5)
    assert results[0]["tokens"] == results[1]["tokens"]
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (unpacked, packed))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-5)


def test_rows_that_see_each_other_stop_the_run(fit, monkeypatch):
    whole = packing.collate

    def leaking(packs, pad_id):
        batch = whole(packs, pad_id)
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None].expand_as(batch["input_ids"])
        return batch

    monkeypatch.setattr(packing, "collate", leaking)
    with pytest.raises(UserError, match="--packing: 样本互相可见 rows see each other: their hidden states differ by"):
        fit("out", "--packing", "--max_steps", 1)


def test_a_model_with_positions_of_its_own_is_not_packed():
    from chatglm_sft.models.chatglm import ChatGLMConfig, ChatGLMForCausalLM

    sizes = {"vocab_size": 200, "hidden_size": 64, "inner_hidden_size": 64, "num_layers": 1, "num_attention_heads": 2}
    marks = {"bos_token_id": 150, "eos_token_id": 151, "mask_token_id": 152, "gmask_token_id": 153}
    net = ChatGLMForCausalLM(ChatGLMConfig(**sizes, **marks))
    row = {"input_ids": [5, 6, 153, 150, 7, 151], "labels": [-100, -100, -100, -100, 7, 151], "where": "f"}
    with pytest.raises(UserError, match="rows of this model cannot be packed: position_ids are"):
        packing.check_apart(net, FakePacks([[row, row]]), torch.float32)


# --- optimisation ---


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("train_head", [False, True])
def test_label_smoothing_equals_torchs(train_head, softcap):
    torch.manual_seed(0)
    hidden, head = torch.randn(300, 16, requires_grad=True), torch.nn.Linear(16, 50, bias=False)
    head.weight.requires_grad_(train_head)
    targets = torch.randint(0, 50, (300,))
    logits = head(hidden)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
    found = loss.token_losses(hidden, targets, head, 50, None if train_head else head.weight, softcap, 0.1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    wanted = [hidden, head.weight] if train_head else [hidden]
    weights = torch.randn(300)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), wanted),
        torch.autograd.grad((expected * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_label_smoothing_is_no_part_of_the_validation_loss(cfg):
    batch = {"input_ids": torch.tensor([[2, 5, 290, 291]]), "labels": torch.tensor([[-100, 5, 290, 291]])}
    found = []
    for smoothing in (0.0, 0.3):
        net = base(cfg())
        with loss.supervised(net, smoothing):
            found.append((net.eval()(**batch).loss.item(), net.train()(**batch).loss.item()))
    assert found[0][0] == found[1][0] == found[0][1] != found[1][1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("cosine", [1.0, 0.854, 0.5, 0.146]),
        ("cosine_with_restarts", [1.0, 0.5, 1.0, 0.5]),
        ("cosine_with_min_lr", [1.0, 0.868, 0.55, 0.232]),
        ("warmup_stable_decay", [1.0, 1.0, 1.0, 1.0]),
        ("inverse_sqrt", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules(fit, name, expected):
    """Four steps, two epochs of two, without warm-up; the decay's last tenth is the fifth step, which is not made."""
    flags = ["--epochs", 2, "--batch_size", 12, "--micro_batch_size", 12, "--logging_steps", 1, "--warmup_ratio", 0]
    folder = fit("out", *flags, "--learning_rate", 1e-3, "--lr_scheduler_type", name)
    log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    assert [round(record["learning_rate"] / 1e-3, 3) for record in log] == expected


def test_a_run_that_ends_by_its_steps_restarts_once_a_pass_too(fit):
    flags = ["--max_steps", 4, "--batch_size", 12, "--micro_batch_size", 12, "--logging_steps", 1, "--warmup_ratio", 0]
    folder = fit("out", *flags, "--learning_rate", 1e-3, "--lr_scheduler_type", "cosine_with_restarts")
    log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    assert [round(record["learning_rate"] / 1e-3, 3) for record in log] == [1.0, 0.5, 1.0, 0.5]


def test_one_epoch_and_a_half(fit, tmp_path):
    """Three steps where an epoch has two; resumed after its second step it ends alike."""
    flags = ["--epochs", 1.5, "--batch_size", 12, "--micro_batch_size", 12, "--logging_steps", 1, "--save_steps", 2]
    flags += ["--lr_scheduler_type", "cosine_with_restarts", "--warmup_ratio", 0, "--learning_rate", 1e-3]
    whole = fit("whole", *flags)
    resumed = fit("resumed", *flags, "--resume", whole / "checkpoint-2")
    log = [json.loads(line) for line in (whole / "trainer_log.jsonl").read_text().splitlines()]
    assert [(record["step"], record["epoch"]) for record in log] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert [round(record["learning_rate"] / 1e-3, 3) for record in log] == [1.0, 0.25, 0.75]  # two cycles
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (whole, resumed)]
    assert weights[0] == weights[1]


def test_neftune_and_betas_reach_the_training(fit, monkeypatch):
    seen = []
    monkeypatch.setattr(trainer.SupervisedTrainer, "train", lambda self, **kwargs: seen.append(self) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit("out", "--neftune_noise_alpha", 5, "--adam_beta1", 0.8, "--adam_beta2", 0.95)
    arguments = seen[0].args
    assert (arguments.neftune_noise_alpha, arguments.adam_beta1, arguments.adam_beta2) == (5.0, 0.8, 0.95)


@pytest.mark.parametrize("target", ["q_proj", "q_proj,embed_tokens"])
def test_neftune_changes_training_alone(fit, target):
    flags = ["--target_modules", target, "--max_steps", 2, "--batch_size", 24, "--logging_steps", 1]
    plain, noisy = fit("plain", *flags), fit("noisy", *flags, "--neftune_noise_alpha", 50)
    first, second = (json.loads((f / "trainer_log.jsonl").read_text().splitlines()[0])["loss"] for f in (plain, noisy))
    assert first != second == pytest.approx(first, rel=0.5)


# --- options ---


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--quantization_bit", 4], "--quantization_bit 对 --tuning lora 不起作用 .* --tuning qlora"),
        (["--tuning", "full", "--lora_r", 8], "--lora_r 对 --tuning full 不起作用 .* --tuning lora or qlora"),
        (["--freeze_trainable_layers", 2], "--freeze_trainable_layers 对 --tuning lora 不起作用"),
        (["--tuning", "qlora", "--use_pissa"], "--use_pissa 需要未量化的基座"),
        (["--use_dora", "--use_pissa"], "--use_pissa 与 --use_dora 不能同用"),
        (["--use_dora", "--tuning", "qlora", "--quantization_bit", 8], "--use_dora 与 --quantization_bit 8 不能同用"),
        (["--prompt_style", "plain", "--thinking", "keep"], "--thinking keep 对 --prompt_style plain 不起作用"),
        (["--prompt_style", "log", "--thinking", "keep"], "--thinking keep .*; use --thinking auto"),
        (["--tuning", "qlora", "--quantization_bit", 3], "quantization_bit.*invalid choice: 3"),
    ],
)
def test_options_that_do_not_go_together(cfg, capsys, flags, problem):
    with pytest.raises(SystemExit) as stopped:
        cfg(*flags)
    assert stopped.value.code == 2
    assert re.search(problem, capsys.readouterr().err)


def test_an_export_is_never_quantised(capsys):
    with pytest.raises(SystemExit):
        parse(Config, ExportFlags, ["--quantization_bit", "8"])
    assert "--quantization_bit 对 --tuning lora 不起作用" in capsys.readouterr().err


def test_all_weights_take_smaller_steps(cfg):
    assert cfg().learning_rate == 2e-4
    assert cfg("--tuning", "full").learning_rate == pytest.approx(2e-5)
    assert cfg("--tuning", "freeze", "--learning_rate", 1e-4).learning_rate == 1e-4
    assert parse(Config, None, ["--tuning", "full"]).learning_rate == pytest.approx(4e-4), "the embedded model's"
    assert cfg("--tuning", "qlora").bits == 4 and cfg("--tuning", "qlora", "--quantization_bit", 8).bits == 8
    assert cfg().bits == 0
