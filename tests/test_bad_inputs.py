"""No recipe ends in a traceback: each of them over one table of bad bases, runs, data and values."""

import importlib
import json
import pickle
import shutil

import pytest

from common.errors import run_main

FAMILIES = {
    "gemma_sft.ft_gemma": "small_gemma",
    "qwen2_sft.ft_qwen2": "small_qwen",
    "chatglm_sft.ft_chatglm": "small_chatglm",
    "chatglm_sft.ft_glm4": "small_glm4",
}
ANSWERING = ["predict", "evaluation", "post_api"]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
ROW = {"query": "1+1", "response": "2"}


def put(name, content):
    """What writes a file into a folder."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def drop(*names):
    """What takes files out of a folder."""

    def drop_them(folder):
        for path in (path for name in names for path in folder.glob(name) if path.is_file()):
            path.unlink()

    return drop_them


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


def config(name="config.json", **changes):
    def change(folder):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
BASES = {
    "no files": drop("*"),
    "no config": drop("config.json"),
    "no weights": drop(WEIGHTS),
    "no tokenizer": drop("tokenizer*", "*.model", "special_tokens_map.json"),
    "weights cut off": cut(WEIGHTS),
    "weights empty": put(WEIGHTS, b""),
    "weights a pointer": put(WEIGHTS, POINTER),
    "weights a page": put(WEIGHTS, "<html>log in</html>"),
    "an index of nothing": lambda folder: (
        put("model.safetensors.index.json", '{"weight_map": {"a": "none.safetensors"}}')(folder),
        drop(WEIGHTS)(folder),
    ),
    "a broken index": lambda folder: (put("model.safetensors.index.json", "{")(folder), drop(WEIGHTS)(folder)),
    "config cut off": cut("config.json"),
    "config empty": put("config.json", ""),
    "config a list": put("config.json", "[]"),
    "config of nothing": put("config.json", "{}"),
    "config of an unknown model": config(model_type="mamba9"),
    "config of another family": config(model_type="bert", architectures=["BertModel"]),
    "config of other layers": config(num_hidden_layers=9, num_layers=9),
    "config with words for numbers": config(hidden_size="wide"),
    "config with remote code": config(auto_map={"AutoModelForCausalLM": "evil.Model"}, model_type="evil"),
    "tokenizer config cut off": cut("tokenizer_config.json"),
    "tokenizer config a list": put("tokenizer_config.json", "[]"),
    "chat template broken": put("chat_template.jinja", "{% for m in messages %}{{ m.content }}"),
    "an adapter": lambda folder: (drop("*")(folder), put("adapter_config.json", "{}")(folder)),
}
RUNS = {
    "no files": drop("*"),
    "no adapter": drop(ADAPTER),
    "adapter cut off": cut(ADAPTER),
    "adapter empty": put(ADAPTER, b""),
    "adapter a page": put(ADAPTER, "<html>log in</html>"),
    "adapter config broken": put("adapter_config.json", "{"),
    "adapter config of nothing": put("adapter_config.json", "{}"),
    "adapter config of another rank": config("adapter_config.json", r=3),
    "adapter config of no layer": config("adapter_config.json", target_modules=["nowhere"]),
    "adapter config of another kind": config("adapter_config.json", peft_type="PREFIX_TUNING"),
    "manifest broken": put("run_manifest.json", "{"),
    "manifest empty": put("run_manifest.json", ""),
    "manifest a list": put("run_manifest.json", "[]"),
    "manifest of nothing": put("run_manifest.json", "{}"),
    "manifest of another base": config("run_manifest.json", base={"path": "/gone/base", "sha256": "0"}),
    "manifest with numbers for words": config("run_manifest.json", base=1, config=2),
}
DATA = {
    "empty": b"",
    "blanks": b"\n \n\n",
    "a byte order mark": b"\xef\xbb\xbf",
    "UTF-16": '{"query": "1", "response": "2"}'.encode("utf-16"),
    "GBK": '{"query": "问题", "response": "回答"}'.encode("gbk"),
    "zeros": bytes(4096),
    "noise": bytes(range(256)) * 8,
    "a number": b"1",
    "a text": b'"text"',
    "null": b"null",
    "nothing in a list": b"[]",
    "lists": b"[[1], [2]]",
    "an array cut off": b'[{"query": "1", "response": "2"},\n{"query": "3", "resp',
    "an object cut off": b'{"query": "1", "respo',
    "a page": b"<!DOCTYPE html><html><body>log in</body></html>",
    "a pointer": POINTER,
    "a pickle": pickle.dumps([ROW]),
    "a PDF": b"%PDF-1.7\n1 0 obj",
    "Parquet cut off": b"PAR1" + bytes(99),
    "Arrow": b"ARROW1" + bytes(99),
    "gzip without its name": b"\x1f\x8b\x08\x00" + bytes(50),
    "one column": b"a\n1\n2\n",
    "deep": b"[" * 100_000,
    "questions without answers": b'{"query": "1"}\n',
    "a preference pair": b'{"prompt": "1", "chosen": "2", "rejected": "3"}\n',
    "numbers beyond all": b'{"query": "1", "response": NaN}\n',
}
VALUES = {
    "an unknown flag": ["--learning_rat", "1"],
    "a word for a number": ["--seed", "many"],
    "a number out of range": ["--max_new_tokens", "0"],
    "a style there is not": ["--prompt_style", "nice"],
    "a missing config file": ["--config", "/nowhere/knobs.yaml"],
    "a folder as config file": ["--config", "/"],
    "a value missing": ["--seed"],
    "a stray word": ["out"],
    "a device there is not": ["--dtype", "float8"],
}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    """(module of a family's recipes, a copy of its small model)."""
    small = request.getfixturevalue(FAMILIES[request.param])
    return request.param, shutil.copytree(small, tmp_path / "base")


@pytest.fixture
def ends_well(family, capfd, tmp_path, monkeypatch):
    """ends_well(recipe, *flags): that it ends with a code other than 0 and says why in a line, not in a traceback."""
    monkeypatch.chdir(tmp_path)

    def run(recipe, *flags):
        main = importlib.import_module(f"{family[0]}.{recipe}").main
        with pytest.raises(SystemExit) as ended:
            run_main(lambda: main([str(flag) for flag in flags]))
        told = capfd.readouterr().err
        assert ended.value.code in (1, 2), told
        assert "Traceback" not in told
        said = [line for line in told.splitlines() if "错误 error: " in line or ": error: " in line]
        assert len(said) == 1 and told.splitlines()[-1] == said[0], told
        return said[0]

    return run


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    return path


@pytest.fixture
def given(family, tmp_path):
    """Flags that every recipe takes: the base, and folders of its own."""
    folders = ["--model_save_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache"]
    return ["--path_model_pretrain", family[1], *folders]


@pytest.mark.parametrize("kind", BASES)
def test_bases(family, ends_well, rows_file, given, tmp_path, kind):
    BASES[kind](family[1])
    assert str(family[1]) in ends_well("train", *given, "--data_path", rows_file)
    assert str(family[1]) in ends_well("predict", *given, "--base", "--query", "1")
    assert str(family[1]) in ends_well("evaluation", *given, "--base", "--data_path", rows_file)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", DATA)
def test_data(ends_well, given, tmp_path, kind):
    path = tmp_path / "rows"
    path.write_bytes(DATA[kind])
    assert str(path) in ends_well("train", *given, "--data_path", path)
    assert str(path) in ends_well("evaluation", *given, "--base", "--data_path", path)


@pytest.mark.parametrize("recipe", ["train", *ANSWERING, "export"])
@pytest.mark.parametrize("kind", VALUES)
def test_values(family, ends_well, tmp_path, kind, recipe):
    ends_well(recipe, "--path_model_pretrain", family[1], "--model_save_dir", tmp_path / "out", *VALUES[kind])


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    """trained(name, base): the folder of a family's short run on `base`, made once."""
    folders = {}

    def make(name):
        if name not in folders:
            parent = tmp_path_factory.mktemp("trained")
            (parent / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
            flags = ["--data_path", parent / "rows.jsonl", "--model_save_dir", parent / "out", "--max_steps", 1]
            flags += ["--path_model_pretrain", request.getfixturevalue(FAMILIES[name]), "--eval_rows", 0]
            flags += ["--val_set_size", 0, "--cache_dir", parent / "cache"]
            importlib.import_module(f"{name}.train").main(list(map(str, flags)))
            folders[name] = parent / "out"
        return folders[name]

    return make


@pytest.mark.parametrize("kind", RUNS)
def test_runs(family, ends_well, trained, rows_file, tmp_path, kind):
    folder = shutil.copytree(trained(family[0]), tmp_path / "out")
    RUNS[kind](folder)
    named = "/gone/base" if kind == "manifest of another base" else str(folder)
    assert named in ends_well("predict", "--model_save_dir", folder, "--query", "1")
    assert named in ends_well("evaluation", "--model_save_dir", folder, "--data_path", rows_file)
    assert named in ends_well("post_api", "--model_save_dir", folder)
    assert named in ends_well("export", "--model_save_dir", folder, "--output_dir", tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    given = ["--path_model_pretrain", family[1], "--data_path", rows_file, "--cache_dir", tmp_path / "cache"]
    given += ["--val_set_size", 0, "--model_save_dir", tmp_path / "next"]
    assert named in ends_well("train", *given, "--adapter_name_or_path", folder)
