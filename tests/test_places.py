"""Files that cannot be read and folders that cannot be written are told first, before a tokenizer or base is loaded."""

import importlib
import json
import socket
import zipfile

import pytest

from common.cli import parse
from common.config import TrainFlags
from common.errors import UserError, run_main
from common.runs import places
from gemma_sft.ft_gemma import export
from gemma_sft.ft_gemma.config import Config

FAMILIES = ["gemma_sft.ft_gemma", "qwen2_sft.ft_qwen2"]
FAMILIES += [f"chatglm_sft.{recipes}" for recipes in ("ft_chatglm", "ft_chatglm2", "ft_chatglm3", "ft_glm4")]
NO_BASE = "/nowhere/base"  # a recipe that came to load it would say so


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"query": "1+1", "response": "2"}) + "\n")
    return path


@pytest.fixture
def line_of(capsys):
    """line_of(main, *flags): the only line on stderr of a recipe that ends with exit code 1."""

    def run(main, *flags):
        with pytest.raises(SystemExit) as ended:
            run_main(lambda: main(list(map(str, flags))))
        assert ended.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("错误 error: ")

    return run


@pytest.fixture(params=FAMILIES)
def train_line(request, line_of, rows_file, tmp_path):
    """train_line(*flags): how train.py ends with flags that are in order except for these."""

    def run(*flags):
        given = ["--path_model_pretrain", NO_BASE, "--data_path", rows_file, "--model_save_dir", tmp_path / "out"]
        given += ["--cache_dir", tmp_path / "cache", *flags]
        return line_of(importlib.import_module(f"{request.param}.train").main, *given)

    return run


def test_what_is_in_order_is_not_told(train_line, tmp_path):
    assert train_line().startswith(f"{NO_BASE}: 文件夹不存在 no such folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"], "asking leaves nothing"


@pytest.mark.parametrize("knob", ["data_path", "eval_data_path"])
def test_a_file_that_cannot_be_read_is_told_first(train_line, tmp_path, rows_file, knob, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with socket.socket(socket.AF_UNIX) as unreadable:  # also for root
        unreadable.bind("socket")
    for path, told in (
        (tmp_path / "none.jsonl", "文件不存在 no such file"),
        (tmp_path / "none.jsonl#3", "文件不存在 no such file"),
        (tmp_path / "empty", "没有文件 there is no file"),
        (tmp_path / "*.csv", "没有文件 there is no file"),
        (rows_file / "below.jsonl", "无法打开 cannot be opened: Not a directory"),
        (tmp_path / "socket", "无法打开 cannot be opened: No such device or address"),
    ):
        name = str(path).removesuffix("#3")
        assert train_line(f"--{knob}", rows_file, path) == f"{name}: {told}; check --{knob}"


def test_held_out_rows_that_are_not_read_are_not_asked_for(train_line, tmp_path):
    assert "no such folder" in train_line("--eval_data_path", tmp_path / "none.jsonl", "--eval_rows", 0)


def test_urls_are_not_tried(train_line):
    assert "no such folder" in train_line("--data_path", "https://127.0.0.1:9/rows.jsonl")


@pytest.mark.parametrize("knob", ["model_save_dir", "cache_dir"])
def test_a_folder_that_cannot_be_written_is_told_first(train_line, rows_file, knob):
    for path, told in (
        (rows_file, f"{rows_file} 是文件，不是文件夹 is a file, not a folder"),
        (rows_file / "out", f"{rows_file} 是文件，不是文件夹 is a file, not a folder"),
        ("/proc/none/out", "无法写入 cannot be written: No such file or directory"),
    ):
        assert train_line(f"--{knob}", path) == f"{path}: {told}; give another --{knob}"


def test_print_targets_reads_and_writes_nothing(train_line, tmp_path):
    flags = ["--print_targets", "--data_path", tmp_path / "none.jsonl", "--model_save_dir", "/proc/none"]
    assert "no such folder" in train_line(*flags)


def test_a_check_leaves_data_to_its_report(train_line, tmp_path):
    flags = ["--check", "--data_path", tmp_path / "none.jsonl", "--model_save_dir", "/proc/none"]
    assert "no such folder" in train_line(*flags)
    assert "give another --cache_dir" in train_line(*flags, "--cache_dir", "/proc/none")


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_asks_first(family, line_of, rows_file, tmp_path):
    main = importlib.import_module(f"{family}.evaluation").main
    flags = ["--path_model_pretrain", NO_BASE, "--base", "--model_save_dir", tmp_path / "out"]
    assert "no such folder" in line_of(main, *flags, "--data_path", rows_file)
    missing = tmp_path / "none.jsonl"
    assert line_of(main, *flags, "--data_path", missing) == f"{missing}: 文件不存在 no such file; check --data_path"
    (tmp_path / "empty").mkdir()
    line = line_of(main, *flags, "--data_path", tmp_path / "empty")
    assert line == f"{tmp_path}/empty: 没有文件 there is no file; check --data_path"
    line = line_of(main, *flags, "--data_path", rows_file, "--model_save_dir", "/proc/none")
    assert line == "/proc/none: 无法写入 cannot be written: No such file or directory; give another --model_save_dir"


@pytest.mark.parametrize("family", FAMILIES)
def test_export_asks_first(family, line_of, rows_file, tmp_path):
    main = importlib.import_module(f"{family}.export").main
    flags = ["--model_save_dir", tmp_path / "none", "--output_dir"]
    assert "no trained run here" in line_of(main, *flags, tmp_path / "whole")
    assert "give another --output_dir" in line_of(main, *flags, rows_file / "whole")
    assert "/proc/none: 无法写入 cannot be written" in line_of(main, *flags, "/proc/none/whole")


def test_a_file_in_the_place_of_a_run_is_no_run(line_of, rows_file):
    assert "no trained run here" in line_of(
        export.main, "--model_save_dir", rows_file / "x", "--output_dir", "/tmp/x/y"
    )


def test_asking_leaves_nothing(tmp_path):
    places.check_writable(tmp_path / "a/b", "model_save_dir")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("escaped", ["{{name}}", "{{NAME}}", "<NAME>", "\\u003cAUTHOR\\u003e", "{{author}}"])
def test_a_name_is_asked_for_where_a_row_has_a_place_for_it(train_line, rows_file, tmp_path, escaped):
    line = train_line("--model_name", "Qwen/Qwen2.5-7B")
    assert line.startswith("--model_name Qwen/Qwen2.5-7B: 数据里没有占位符 no row of --data_path holds a placeholder")
    assert train_line("--check", "--model_author", "a", "b").startswith("--model_author a: ")
    identity = tmp_path / "identity.jsonl"
    identity.write_text(f'{{"query": "who", "response": "{escaped}"}}\n')
    assert "no such folder" in train_line("--model_name", "a", "--data_path", rows_file, f"{identity}#1")


def test_data_whose_text_is_packed_may_hold_a_name(train_line, tmp_path):
    for name in ("rows.parquet", "none.jsonl"):
        assert "placeholder" not in train_line("--model_name", "a", "--data_path", tmp_path / name)


def test_the_files_of_a_folder_are_told_behind_the_base(capsys, rows_file, tmp_path):
    (tmp_path / "README.md").touch()
    cfg, flags = parse(Config, TrainFlags, ["--data_path", str(rows_file), str(tmp_path)])
    places.show_base(cfg, flags)
    base, files = capsys.readouterr().out.splitlines()
    assert base.startswith("基座 base: ")
    assert files == f"数据 {tmp_path}: 1 个文件 files: rows.jsonl; 不读 left out: README.md"


def test_a_file_of_an_archive_is_opened_by_its_archive(line_of, tmp_path):
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as packed:
        for name in ("a.jsonl", "b.jsonl"):
            packed.writestr(name, json.dumps({"query": "1+1", "response": "2"}))
    places.check_readable([str(tmp_path / "two.zip")], "data_path")
    with pytest.raises(UserError, match="none.zip/a.jsonl|none.zip: .*no such file"):
        places.check_readable([str(tmp_path / "none.zip/a.jsonl")], "data_path")


@pytest.mark.parametrize(("given", "told"), [([], "shipped here"), (["--model", "a/b"], "基座 base: a/b\n")])
def test_the_base_is_told(capsys, given, told):
    for json_too in ([], ["--check", "--json"]):
        cfg, flags = parse(Config, TrainFlags, [*given, *json_too])
        places.show_base(cfg, flags)
        out, err = capsys.readouterr()
        assert (out, err)[bool(json_too)].startswith("基座 base: ") and told in out + err
        assert not (err, out)[bool(json_too)]
