"""Folders that are not what they should be: one line that names the folder, what was found and the way out."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from common.cli import parse
from common.config import PredictFlags
from common.conversation.turns import Turn
from common.errors import UserError, run_main
from common.model import loading
from gemma_sft import prompt
from gemma_sft.ft_gemma import evaluation, export, post_api, predict, train
from gemma_sft.ft_gemma.config import Config

FIRST = "model.layers.1.mlp.down_proj.weight"
WEIGHTS = "权重与模型不符 the weights do not fit the model: "


def rewritten(change):
    """What puts `change`d tensors ({name: tensor} to another) into a folder's weight file."""

    def rewrite(folder):
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return rewrite


def without(text):
    return rewritten(lambda tensors: {name: value for name, value in tensors.items() if text not in name})


def prefixed(prefix):
    return rewritten(lambda tensors: {prefix + name: value for name, value in tensors.items()})


def with_value(number):
    return rewritten(lambda tensors: tensors | {FIRST: torch.full_like(tensors[FIRST], number)})


def configured(**changes):
    """What changes a folder's config.json."""

    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


BROKEN_WEIGHTS = {  # kind: (what breaks a folder with a small Gemma, what is said of it)
    "a layer is missing": (
        without("layers.1."),
        f"{WEIGHTS}9 缺少 missing, e.g. model.layers.1.input_layernorm.weight; ",
    ),
    "a wrapped save": (
        prefixed("base_model.model."),
        f"{WEIGHTS}20 缺少 missing, e.g. model.embed_tokens.weight; 20 多余 unexpected, e.g. base_model.model.",
    ),
    "what a wrapped save is": (prefixed("base_model.model."), "looks like an adapter's or a peft-wrapped save"),
    "names with a prefix": (
        prefixed("net.module."),
        "all names begin with net.module., as of a model that was wrapped",
    ),
    "an untied head is missing": (
        configured(tie_word_embeddings=False),
        "1 缺少 missing, e.g. lm_head.weight; config.json 说输出层不与嵌入共享 says tie_word_embeddings false",
    ),
    "a tensor more": (
        rewritten(lambda tensors: tensors | {"v_head.weight": torch.zeros(2)}),
        f"{WEIGHTS}1 多余 unexpected, e.g. v_head.weight; ",
    ),
    "another width": (
        configured(intermediate_size=48),
        "6 形状不同 of another shape, e.g. model.layers.0.mlp.down_proj",
    ),
    "another vocabulary": (
        rewritten(lambda tensors: tensors | {"model.embed_tokens.weight": torch.zeros(99, 32)}),
        "e.g. model.embed_tokens.weight: [99, 32], config.json says [",
    ),
    "what another vocabulary is": (configured(vocab_size=4000), "vocab_size does not fit the weights: restore config"),
    "NaN": (with_value(float("nan")), f"权重里有 NaN 或 inf the weights hold NaN or inf: 1 of 20, e.g. {FIRST}; "),
    "inf": (with_value(float("-inf")), f"the weights hold NaN or inf: 1 of 20, e.g. {FIRST}; "),
}


def emptied(folder):
    for file in folder.glob("*"):
        file.unlink()


def an_adapter(folder):
    emptied(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "google/gemma-2b-it"}')


def moved_below(folder):
    files = list(folder.iterdir())
    (folder / "snapshots/1a2b").mkdir(parents=True)
    for file in files:
        file.rename(folder / "snapshots/1a2b" / file.name)


def longer_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.save_pretrained(folder)


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


BROKEN_FOLDERS = {  # kind: (what breaks a folder with a small Gemma, what is said of it)
    "an adapter": (
        an_adapter,
        "{folder}: 是适配器，不是基座模型 is an adapter, not a base model: give its base, --path_model_pretrain google",
    ),
    "no config.json": (
        lambda folder: (folder / "config.json").unlink(),
        "{folder}: 没有 there is no config.json, so it is not a model's folder; 那里有 it holds chat_templ",
    ),
    "an empty folder": (emptied, "it holds nothing; down"),
    "a folder of the hub's cache": (moved_below, "there is one below: --path_model_pretrain {folder}/snapshots/1a2b"),
    "a config that is no JSON": (
        written("config.json", '{"model_type": "gemma",'),
        "{folder}/config.json: 不是 JSON is not",
    ),
    "a config that is no object": (
        written("config.json", "[]"),
        "{folder}/config.json: 不是 JSON 对象 is not a JSON obj",
    ),
    "a config of nothing": (written("config.json", "{}"), "{folder}: 无法加载"),
    "a config of a wrong type": (configured(hidden_size="wide"), "{folder}: 无法加载"),
    "a tokenizer of no kind": (
        written("tokenizer.json", '{"model": 1}'),
        "{folder}: 无法加载分词器 tokenizer cannot be",
    ),
    "a tokenizer of nothing": (
        written("tokenizer.json", "{}"),
        "tokenizer cannot be loaded: {folder}/tokenizer.json: 缺少或损坏 missing or damaged: model, added_tokens; "
        "download the file again",
    ),
    "a tokenizer without a model": (
        written("tokenizer.json", '{"added_tokens": []}'),
        "{folder}/tokenizer.json: 缺少或损坏 missing or damaged: model; download the file again",
    ),
    "a tokenizer that is a list": (
        written("tokenizer.json", "[]"),
        "{folder}/tokenizer.json: 不是 JSON 对象 is not a JSON object; download the file again",
    ),
    "a tokenizer that is empty": (
        written("tokenizer.json", ""),
        "{folder}/tokenizer.json: 文件是空的 the file is empty; download or copy it again",
    ),
    "a tokenizer that is cut off": (
        lambda folder: (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:-9]),
        "{folder}/tokenizer.json: 不是 JSON is not JSON: ",
    ),
    "a longer tokenizer": (
        longer_tokenizer,
        "{folder}: 分词器的编号超出词嵌入 the tokenizer has ids that the embedding lacks: 2, e.g. '<tool>' is 3",
    ),
    "a broken chat template": (
        written("chat_template.jinja", "{% for m in messages %}{{ m.content }}"),
        "{folder}: 聊天模板有错 the chat template is broken in line 1: ",
    ),
}
NO_FOLDERS = {  # what is given as --path_model_pretrain: what is said of it
    "C:\\models\\gemma": "C:\\models\\gemma: 文件夹不存在 no such folder (a path of Windows; below WSL C:\\ is",
    "D:/models/gemma": "D:/models/gemma: 文件夹不存在 no such folder (a path of Windows",
    "models\\gemma": "models\\gemma: 文件夹不存在 no such folder (a path of Windows",
    "/no/such": "/no/such: 文件夹不存在 no such folder; check --path_model_pretrain",
    "./models/gemma": "./models/gemma: 文件夹不存在 no such folder; check --path_model_pretrain",
    "models/of/mine": "models/of/mine: 文件夹不存在 no such folder; check --path_model_pretrain",
    __file__: f"{__file__}: 是文件，不是文件夹 is a file, not a folder: --path_model_pretrain is the folder it is in",
}
SCRIPTS = {"predict": predict, "evaluation": evaluation, "post_api": post_api, "export": export}


@pytest.fixture
def base(small_gemma, tmp_path):
    """A copy of the small model, to be broken."""
    return shutil.copytree(small_gemma, tmp_path / "base")


@pytest.fixture
def line_of(capfd):
    """line_of(main, *flags): the last line on stderr of a recipe that ends with exit code 1, without a traceback."""

    def run(main, *flags):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_main(lambda: main(list(map(str, flags))))
        assert ended.value.code == 1
        told = capfd.readouterr().err
        assert "Traceback" not in told and "LOAD REPORT" not in told and told.count("错误 error: ") == 1
        assert told.splitlines()[-1].startswith("错误 error: ")
        return told.splitlines()[-1]

    return run


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"query": f"{n}+1", "response": str(n + 1)}) + "\n" for n in range(8)))
    return path


@pytest.fixture(scope="module")
def whole_run(small_gemma, rows_file, tmp_path_factory):
    """The folder of a short run that tuned the weights themselves."""
    parent = tmp_path_factory.mktemp("full")
    flags = ["--path_model_pretrain", small_gemma, "--data_path", rows_file, "--model_save_dir", parent / "out"]
    flags += ["--eval_rows", 0, "--val_set_size", 0, "--cache_dir", parent / "cache", "--max_steps", 1]
    train.main(list(map(str, [*flags, "--tuning", "full"])))
    return parent / "out"


def command(script, folder, rows_file):
    """What runs one of SCRIPTS on the run in `folder`: its main, and flags."""
    flags = ["--model_save_dir", folder]
    flags += {"predict": ["--query", "1+1"], "evaluation": ["--data_path", rows_file]}.get(script, [])
    return SCRIPTS[script].main, *flags


# ---------------------------------------------------------------- weights that are not all there, or too many


@pytest.mark.parametrize(("spoil", "told"), BROKEN_WEIGHTS.values(), ids=BROKEN_WEIGHTS)
def test_training_does_not_start_on_broken_weights(base, spoil, told, rows_file, tmp_path, line_of):
    spoil(base)
    out = tmp_path / "out"
    line = line_of(train.main, "--path_model_pretrain", base, "--data_path", rows_file, "--model_save_dir", out)
    assert line.startswith(f"错误 error: {base}: ") and told in line
    assert not out.exists()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["a layer is missing", "a tensor more", "NaN"])
def test_a_broken_whole_model_is_not_used(whole_run, kind, script, rows_file, tmp_path, line_of):
    folder = shutil.copytree(whole_run, tmp_path / "out")
    spoil, told = BROKEN_WEIGHTS[kind]
    spoil(folder)
    line = line_of(*command(script, folder, rows_file))
    assert line.startswith(f"错误 error: {folder}: ") and told in line


@pytest.mark.parametrize("names", ["rotary_emb.inv_freq", "self_attn.rotary_emb.inv_freq", "rotary_emb.cos_cached"])
def test_buffers_of_older_files_are_expected(base, small_gemma, names, capfd):
    rewritten(lambda tensors: tensors | {f"model.layers.0.{names}": torch.zeros(8)})(base)
    net, expected = loading.load_base(base, "float32"), loading.load_base(small_gemma, "float32")
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), expected.parameters(), strict=True))
    assert "REPORT" not in capfd.readouterr().err


def test_a_head_written_beside_the_embeddings_it_is_tied_to_is_expected(base):
    rewritten(lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})(base)
    assert loading.load_base(base, "float32").config.tie_word_embeddings


def test_a_head_of_its_own_is_loaded(small_qwen, tmp_path):
    net = AutoModelForCausalLM.from_pretrained(small_qwen)
    net.config.tie_word_embeddings = False
    own = Qwen2ForCausalLM(net.config)
    own.save_pretrained(tmp_path)
    assert torch.equal(loading.load_base(tmp_path, "float32").lm_head.weight, own.lm_head.weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_a_quantised_base_keeps_beside_its_weights_is_expected(small_gemma, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    loading.load_base(small_gemma, "float32", bits).save_pretrained(tmp_path)
    loading.load_base(tmp_path, "float32", bits)
    without("layers.1.")(tmp_path)
    with pytest.raises(UserError, match="缺少权重 weights are missing in its files"):
        loading.load_base(tmp_path, "float32", bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_to_be_quantised_must_be_whole(base, bits):
    pytest.importorskip("bitsandbytes")
    without("layers.1.")(base)
    with pytest.raises(UserError, match=f"^{base}: .* missing"):
        loading.load_base(base, "float32", bits)


# ---------------------------------------------------------------- what is no model's folder


@pytest.mark.parametrize(("spoil", "told"), BROKEN_FOLDERS.values(), ids=BROKEN_FOLDERS)
def test_a_folder_that_is_no_model_is_named(base, spoil, told, rows_file, tmp_path, line_of):
    spoil(base)
    out = tmp_path / "out"
    for main, flags in ((train.main, ["--data_path", rows_file]), (predict.main, ["--base", "--query", "1+1"])):
        line = line_of(main, "--path_model_pretrain", base, "--model_save_dir", out, *flags)
        assert line.startswith(f"错误 error: {base}") and told.format(folder=base) in line
    assert not out.exists()


@pytest.mark.parametrize(("text", "told"), NO_FOLDERS.items(), ids=range(len(NO_FOLDERS)))
def test_a_path_that_is_not_there_is_named(text, told, rows_file, tmp_path, line_of):
    out = tmp_path / "out"
    for main, flags in ((train.main, ["--data_path", rows_file]), (predict.main, ["--base", "--query", "1+1"])):
        line = line_of(main, "--path_model_pretrain", text, "--model_save_dir", out, *flags)
        assert line.startswith(f"错误 error: {told}")


def test_an_id_that_only_pictures_use_may_be_beyond_the_embedding(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(base)
    assert len(loading.load_tokenizer(base, prompt)) == json.loads((base / "config.json").read_text())["vocab_size"] + 1


def test_a_template_that_refuses_a_conversation_is_not_broken(base):
    (base / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert loading.load_tokenizer(base, prompt).chat_template.startswith("{{ raise")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["an adapter", "a config that is no JSON"])
def test_a_process_ends_with_one_line(recipe, base, kind, rows_file):
    BROKEN_FOLDERS[kind][0](base)
    done = recipe("train.py", "--path_model_pretrain", base, "--data_path", rows_file)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and str(base) in done.stderr


# ---------------------------------------------------------------- adapters and checkpoints that are no finished run


@pytest.fixture(scope="module")
def lora_run(small_gemma, rows_file, tmp_path_factory):
    """The folder of a short run with a checkpoint, whose adapter makes a difference."""
    parent = tmp_path_factory.mktemp("lora")
    flags = ["--path_model_pretrain", small_gemma, "--data_path", rows_file, "--model_save_dir", parent / "out"]
    flags += ["--eval_rows", 0, "--val_set_size", 0, "--cache_dir", parent / "cache", "--max_steps", 3]
    train.main(list(map(str, [*flags, "--save_steps", 2, "--learning_rate", 0.5, "--target_modules", "all-linear"])))
    return parent / "out"


@pytest.fixture
def foreign(lora_run, tmp_path):
    """The adapter of the run as peft, TRL or LLaMA-Factory leave one: no manifest."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(lora_run / name, folder)
    return folder


def logits_of(folder, *flags, base=False):
    """Logits of what predict.py asks with these flags, for a short question."""
    given = ["--model_save_dir", folder, "--dtype", "float32", *flags]
    answer = predict.load_answer(parse(Config, PredictFlags, list(map(str, given)))[0], base)
    with torch.inference_mode():
        return answer.net(torch.tensor([answer.fitted_ids([Turn("user", "1+1")])])).logits


def test_an_adapter_of_another_tool_answers_as_the_run_does(lora_run, foreign, small_gemma, capfd):
    expected, base = logits_of(lora_run), logits_of(lora_run, base=True)
    assert not torch.allclose(expected, base)
    assert "adapter of another tool" not in capfd.readouterr().err
    for flags in ([], ["--path_model_pretrain", small_gemma]):
        assert torch.equal(logits_of(foreign, *flags), expected)
        line = f"{foreign}: 其他工具训练的适配器 an adapter of another tool, base {small_gemma}, prompt_style chat"
        assert line in capfd.readouterr().err.splitlines()
    assert torch.equal(logits_of(foreign, base=True), base)


def test_the_base_given_wins_over_the_one_an_adapter_names(foreign, small_gemma, lora_run, line_of):
    file = foreign / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "/gone/base"}))
    assert torch.equal(logits_of(foreign, "--path_model_pretrain", small_gemma), logits_of(lora_run))
    line = line_of(predict.main, "--model_save_dir", foreign, "--query", "1")
    assert line == "错误 error: /gone/base: 文件夹不存在 no such folder; check --path_model_pretrain"


def test_a_checkpoint_answers_with_its_runs_base(lora_run, small_gemma, capfd):
    checkpoint = lora_run / "checkpoint-2"
    assert not torch.allclose(logits_of(checkpoint), logits_of(lora_run))
    told = capfd.readouterr().err.splitlines()
    assert f"{checkpoint}: 训练中的检查点 a checkpoint of the run in {lora_run}, base {small_gemma}" in told


def test_a_checkpoint_that_was_cut_off_is_not_used(lora_run, tmp_path, line_of):
    folder = shutil.copytree(lora_run, tmp_path / "out") / "checkpoint-2"
    (folder / "whole.json").unlink()
    line = line_of(predict.main, "--model_save_dir", folder, "--query", "1")
    assert line.startswith(f"错误 error: {folder}: 不是完整的检查点 not a whole checkpoint")


@pytest.mark.parametrize("kind", ["foreign", "checkpoint"])
def test_they_are_scored_and_exported(lora_run, foreign, kind, rows_file, tmp_path, capfd):
    folder = foreign if kind == "foreign" else shutil.copytree(lora_run, tmp_path / "out") / "checkpoint-2"
    evaluation.main(list(map(str, ["--model_save_dir", folder, "--data_path", rows_file, "--max_new_tokens", 4])))
    assert "tuned" in json.loads((folder / "all_results.json").read_text())
    export.main(list(map(str, ["--model_save_dir", folder, "--output_dir", tmp_path / "whole"])))
    assert (tmp_path / "whole/model.safetensors").is_file()
    assert json.loads((tmp_path / "whole/export.json").read_text())["run"] == str(folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "只支持 LoRA only LoRA adapters are used, this is PROMPT_TUNING"),
        ({"init_lora_weights": "pissa_niter_16"}, "a PiSSA adapter as it is while training"),
    ],
)
def test_adapters_that_are_no_lora_are_named(foreign, changes, told, line_of):
    file = foreign / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    line = line_of(predict.main, "--model_save_dir", foreign, "--query", "1")
    assert line.startswith(f"错误 error: {foreign}: ") and told in line
