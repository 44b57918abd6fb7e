"""Knobs: where a value comes from, what is refused and how, and that a recipe does no work before it is asked to."""

import ast
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import pytest

from common.cli import parse
from common.config import EvaluationFlags, ExportFlags, PredictFlags, ServeFlags, SFTConfig, TrainFlags
from common.knobs import ALIASES, BELONGS, FREE, IDS, LEARNING, PATH_LISTS, PATHS, RANGES, SHAPING, STEPS
from gemma_sft.ft_gemma.config import Config

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"train": TrainFlags, "predict": PredictFlags, "evaluation": EvaluationFlags, "post_api": ServeFlags}
HUB = ["--path_model_pretrain", "google/gemma-2b-it"]


@dataclass(frozen=True)
class Toy(SFTConfig):
    """A family made here, so that its values are literals of this file."""

    learning_rate: float = 0.25  # the family's
    micro_batch_size: int = 4  # the family's
    batch_size: int = 16  # the family's
    lora_r: int = 8  # the family's
    target_modules: tuple[str, ...] = ("one", "two")  # the family's

    EMBEDDED_DIR: ClassVar[Path] = ROOT / "toy"
    EMBEDDED: ClassVar[dict] = {"learning_rate": 0.5, "lora_r": 2, "target_modules": ("three",)}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """No launcher's variable reaches these tests."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def settle(*argv, family=Toy):
    """The config of a command line, as train.py has it."""
    return parse(family, TrainFlags, [str(word) for word in argv])[0]


def refusal(capsys, *argv, family=Config):
    """The one line a refused command line leaves on stderr."""
    with pytest.raises(SystemExit) as stop:
        settle(*argv, family=family)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1), err
    return err


def write(folder, name, content):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


# ---------------------------------------------------------------- where a value comes from


@pytest.mark.parametrize(
    "name, text", [("c.yaml", "port: 9001\n"), ("c.yml", "port: 9001"), ("c.json", '{"port":9001}')]
)
def test_default_then_family_then_file_then_flag(tmp_path, name, text):
    file = write(tmp_path, name, text)
    assert settle(family=SFTConfig).port == 8000
    assert settle(family=Config).port == 8044
    assert settle("--config", file, family=Config).port == 9001
    assert settle("--config", file, "--port", 9002, family=Config).port == 9002
    assert settle("--port", 9002, "--config", file, family=Config).port == 9002


def test_every_layer_at_once(tmp_path):
    file = write(tmp_path, "c.yaml", "lora_alpha: 5\nlora_r: 6\n")
    cfg = settle("--config", file, "--lora_r", 7, *HUB)
    assert (cfg.seed, cfg.learning_rate, cfg.lora_alpha, cfg.lora_r) == (42, 0.25, 5, 7)
    assert cfg.given == {"lora_alpha", "lora_r", "path_model_pretrain"}


def test_the_last_of_two_spellings_wins():
    assert settle("--lr", 0.1, "--learning_rate", 0.2).learning_rate == 0.2
    assert settle("--learning_rate", 0.2, "--lr", 0.1).learning_rate == 0.1


def test_embedded_values_stand_where_nothing_was_set():
    cfg = settle()
    assert (cfg.path_model_pretrain, cfg.learning_rate, cfg.lora_r, cfg.target_modules) == (
        "embedded",
        0.5,
        2,
        ("three",),
    )
    assert cfg.base == str(ROOT / "toy") and SFTConfig().base == "", "none is shipped"


@pytest.mark.parametrize("how", ["flag", "file"])
def test_embedded_values_give_way_to_the_user(tmp_path, how):
    file = write(tmp_path, "c.json", '{"learning_rate": 0.125}')
    argv = ["--config", file] if how == "file" else ["--learning_rate", 0.125]
    cfg = settle(*argv)
    assert (cfg.learning_rate, cfg.lora_r, cfg.target_modules) == (0.125, 2, ("three",))


def test_a_value_equal_to_the_default_is_still_the_users():
    assert settle("--lora_r", 8, "--learning_rate", 0.25).lora_r == 8
    assert settle("--lora_r", 8, "--learning_rate", 0.25).learning_rate == 0.25


@pytest.mark.parametrize(
    "argv, base",
    [
        (["--path_model_pretrain", "google/gemma-2b"], "google/gemma-2b"),
        (["--model_name_or_path", "google/gemma-2b"], "google/gemma-2b"),
        (["--repo_id", "google/gemma-7b"], "google/gemma-7b"),
        (["--repo_id", "google/gemma-7b", "--path_model_pretrain", "google/gemma-2b"], "google/gemma-2b"),
    ],
)
def test_another_base_has_the_familys_values(argv, base):
    cfg = settle(*argv)
    assert (cfg.base, cfg.learning_rate, cfg.lora_r, cfg.target_modules) == (base, 0.25, 8, ("one", "two"))


def test_gemma_embedded_and_real():
    embedded, real = settle(family=Config), settle(*HUB, family=Config)
    assert {name: getattr(embedded, name) for name in Config.EMBEDDED} == Config.EMBEDDED
    assert Path(embedded.base) == ROOT / "gemma_sft/embedded"
    assert Config.EMBEDDED.keys() <= {field.name for field in fields(Config)}
    assert (real.base, real.learning_rate, real.target_modules) == (
        "google/gemma-2b-it",
        2e-4,
        ("q_proj", "k_proj", "v_proj"),
    )


def test_own_data_is_not_scored_on_the_shipped_rows(tmp_path):
    data, held = tmp_path / "my.jsonl", tmp_path / "held.jsonl"
    assert settle().eval_data_path == (str(ROOT / "data/product_heldout.jsonl"),)
    assert settle("--data_path", data).eval_data_path == ()
    assert settle("--data_path", data, "--eval_data_path", held).eval_data_path == (str(held),)


# ---------------------------------------------------------------- how a value may be written


@pytest.mark.parametrize(
    "alias, typed, name, value",
    [
        ("model_name_or_path", "a/b", "path_model_pretrain", "a/b"),
        ("model", "a/b", "path_model_pretrain", "a/b"),
        ("model_path", "a/b", "path_model_pretrain", "a/b"),
        ("output_dir", "/tmp/out", "model_save_dir", "/tmp/out"),
        ("dataset", "/tmp/a.json", "data_path", ("/tmp/a.json",)),
        ("num_train_epochs", "7", "epochs", 7),
        ("num_epochs", "7", "epochs", 7),
        ("num_epochs", "0.5", "epochs", 0.5),
        ("per_device_train_batch_size", "8", "micro_batch_size", 8),
        ("lora_rank", "5", "lora_r", 5),
        ("lr", "1e-5", "learning_rate", 1e-5),
        ("lora_target", "x,y", "target_modules", ("x", "y")),
        ("lora_target_modules", "x", "target_modules", ("x",)),
        ("gradient_clipping", "0.5", "max_grad_norm", 0.5),
        ("activation_checkpointing", "true", "gradient_checkpointing", "true"),
    ],
)
def test_aliases_as_flags_and_in_files(tmp_path, alias, typed, name, value):
    assert getattr(settle(f"--{alias}", typed), name) == value
    assert getattr(settle(f"--{alias}={typed}"), name) == value
    plain = list(value) if isinstance(value, tuple) else value
    file = write(tmp_path, "c.json", json.dumps({alias: plain}))
    cfg = settle("--config", file)
    assert getattr(cfg, name) == value and name in cfg.given


def test_every_alias_leads_to_a_knob():
    knobs = {field.name for field in fields(SFTConfig)}
    assert set(ALIASES.values()) <= knobs and not set(ALIASES) & knobs


def test_every_knob_is_of_one_class():
    """What a change of a knob affects is said once: a new knob has to be put into one of the four classes."""
    knobs = {field.name for field in fields(SFTConfig) if not field.metadata.get("hidden")}
    classes = Counter(name for names in (IDS, SHAPING, LEARNING, FREE) for name in names)
    assert classes == Counter(knobs)


def test_tables_of_knobs_name_knobs_or_flags():
    flags = {field.name for cls in (SFTConfig, *RECIPES.values(), ExportFlags) for field in fields(cls)}
    assert (RANGES.keys() | PATHS | PATH_LISTS) <= flags | {STEPS}
    assert BELONGS.keys() <= SHAPING | LEARNING


@pytest.mark.parametrize("typed", [["q,k,v"], ["q", "k", "v"], ["q,k", "v"], ["q,", "k", ",v"]])
def test_lists_with_blanks_and_commas(typed):
    assert settle("--target_modules", *typed).target_modules == ("q", "k", "v")


@pytest.mark.parametrize("text", ["[q, k, v]", '"q,k,v"', "q,k,v", "\n- q\n- k,v"])
def test_lists_in_yaml(tmp_path, text):
    file = write(tmp_path, "c.yaml", f"target_modules: {text}\n")
    assert settle("--config", file).target_modules == ("q", "k", "v")


@pytest.mark.parametrize("words", [["--gradient_checkpointing"], ["--activation_checkpointing", "true"]])
def test_a_choice_with_true_in_it_may_be_typed_as_a_switch(words):
    assert parse(Toy, None, words).gradient_checkpointing == "true"
    assert parse(Toy, None, []).gradient_checkpointing == "auto"


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["小黄"], ("小黄", "小黄")),
        (["小黄", "Xiao Huang"], ("小黄", "Xiao Huang")),
        (["Lab, Inc."], ("Lab, Inc.", "Lab, Inc.")),
    ],
)
def test_names_have_a_chinese_form_and_another(words, value):
    assert parse(Toy, None, ["--model_name", *words]).model_name == value


@pytest.mark.parametrize(
    "words, value",
    [([], True), (["true"], True), (["1"], True), (["yes"], True), (["True"], True)]
    + [(["false"], False), (["0"], False), (["no"], False), (["FALSE"], False)],
)
def test_booleans(words, value):
    assert settle("--do_sample", *words, "--seed", 1).do_sample is value


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # YAML 1.1 takes this for text
        ("learning_rate: 1", "learning_rate", 1.0),
        ("max_steps: -1", "max_steps", -1),
        ("strict: yes", "strict", True),
        ("gradient_checkpointing: true", "gradient_checkpointing", "true"),
        ("gradient_checkpointing: auto", "gradient_checkpointing", "auto"),
        ("model_name: 小明", "model_name", ("小明", "小明")),
        ("model_name: [小黄, Xiao Huang]", "model_name", ("小黄", "Xiao Huang")),
        ("\ufeffseed: 5", "seed", 5),  # as Windows editors write it
        ("modules_to_save: []", "modules_to_save", ()),
        ("model_save_dir: 7", "model_save_dir", str(Path("7").absolute())),  # no text to YAML
        ("model_save_dir: 0612", "model_save_dir", str(Path("0612").absolute())),  # in base 8
        ("output_dir: 2026_11", "model_save_dir", str(Path("2026_11").absolute())),
    ],
)
def test_values_in_yaml(tmp_path, text, name, value):
    found = getattr(settle("--config", write(tmp_path, "c.yaml", text)), name)
    assert found == value and type(found) is type(value)


def test_a_config_file_may_start_with_a_bom(tmp_path):
    assert settle("--config", write(tmp_path, "c.json", '\ufeff{"seed": 5}')).seed == 5


def test_the_recipes_own_flags_come_beside_the_knobs(tmp_path):
    cfg, flags = parse(Toy, TrainFlags, ["--resume", "never", "--print_targets", "--seed", "3"])
    assert (cfg.seed, flags) == (3, TrainFlags(resume="never", print_targets=True))
    assert parse(Toy, TrainFlags, [])[1] == TrainFlags(resume="auto", print_targets=False)
    file = write(tmp_path, "c.json", '{"query": "你好", "top_k": 3}')
    cfg, flags = parse(Toy, PredictFlags, ["--config", str(file)])
    assert (cfg.top_k, flags.query, flags.base) == (3, "你好", False)
    assert parse(Toy, None, ["--seed", "3"]).seed == 3


# ---------------------------------------------------------------- paths


def test_relative_paths_belong_to_the_caller(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    cfg = settle("--data_path", "a.json#3,sub/../b.csv", "--model_save_dir", "out", "--path_model_pretrain", "base")
    assert [os.path.normpath(path) for path in cfg.data_path] == [f"{tmp_path}/a.json#3", f"{tmp_path}/b.csv"]
    assert (cfg.model_save_dir, cfg.base) == (f"{tmp_path}/out", f"{tmp_path}/base")
    file = write(tmp_path, "c.yaml", "data_path: [a.json]\neval_data_path: e.json\noutput_dir: out\n")
    cfg = settle("--config", file.name)
    assert cfg.data_path == (f"{tmp_path}/a.json",) and cfg.eval_data_path == (f"{tmp_path}/e.json",)
    assert cfg.model_save_dir == f"{tmp_path}/out"


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = settle("--data_path", "~/a.json", "--model_save_dir", "~/out")
    assert (cfg.data_path, cfg.model_save_dir) == ((f"{tmp_path}/a.json",), f"{tmp_path}/out")


@pytest.mark.parametrize("base", ["google/gemma-2b-it", "Qwen/Qwen1.5-4B", "gpt2"])
def test_hub_ids_are_kept(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    assert settle("--path_model_pretrain", base).base == base


def test_urls_are_kept():
    urls = ("https://example.org/a.jsonl#5", "s3://bucket/b.parquet", "memory://c.csv")
    assert settle("--data_path", *urls).data_path == urls


def test_defaults_do_not_depend_on_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = settle(family=Config)
    assert cfg.data_path == (str(ROOT / "data/product_train.jsonl"),)
    assert cfg.model_save_dir == str(ROOT / "gemma_sft/ft_gemma/model_sft")


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize(
    "world, argv, batch, micro, accumulation",
    [
        (1, [], 16, 4, 4),
        (1, ["--micro_batch_size", 8], 16, 8, 2),
        (1, ["--micro_batch_size", 3], 18, 3, 6),  # the batch was left open: it gives way
        (1, ["--micro_batch_size", 32], 32, 32, 1),
        (1, ["--batch_size", 6], 6, 3, 2),  # the micro batch was left open: the largest that fits, 4 at most
        (1, ["--batch_size", 2], 2, 2, 1),
        (1, ["--batch_size", 7], 7, 1, 7),
        (1, ["--micro_batch_size", 3, "--batch_size", 12], 12, 3, 4),
        (2, [], 16, 4, 2),
        (2, ["--micro_batch_size", 3], 18, 3, 3),
        (2, ["--batch_size", 6], 6, 3, 1),
        (2, ["--batch_size", 2], 2, 1, 1),
        (2, ["--micro_batch_size", 2, "--batch_size", 12], 12, 2, 3),
        (3, [], 24, 4, 2),
    ],
)
def test_whole_micro_batches_in_a_batch(monkeypatch, world, argv, batch, micro, accumulation):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    cfg = settle(*argv)
    assert (cfg.batch_size, cfg.micro_batch_size, cfg.accumulation) == (batch, micro, accumulation)
    assert cfg.accumulation * cfg.micro_batch_size * world == cfg.batch_size


@pytest.mark.parametrize(
    "world, argv, remedy",
    [
        (1, ["--micro_batch_size", 3, "--batch_size", 4], "use 6"),
        (1, ["--micro_batch_size", 8, "--batch_size", 4], "use 8"),
        (2, ["--micro_batch_size", 3, "--batch_size", 9], "use 12"),
        (2, ["--batch_size", 3], "--batch_size 3"),
    ],
)
def test_batches_that_do_not_divide_are_refused(monkeypatch, capsys, world, argv, remedy):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert remedy in refusal(capsys, *argv, family=Toy)


@pytest.mark.parametrize(
    "world, argv, batch",
    [
        (1, ["--gradient_accumulation_steps", 3], 12),
        (2, ["--gradient_accumulation_steps", 3], 24),
        (1, ["--gradient_accumulation_steps", 3, "--micro_batch_size", 5], 15),
    ],
)
def test_accumulation_steps_give_the_batch(monkeypatch, tmp_path, world, argv, batch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    cfg = settle(*argv)
    assert (cfg.batch_size, cfg.accumulation) == (batch, 3) and "batch_size" in cfg.given
    knobs = dict(zip((name[2:] for name in argv[::2]), argv[1::2], strict=True))
    assert settle("--config", write(tmp_path, "c.json", json.dumps(knobs))) == cfg


HABITUAL = {  # flags of LLaMA-Factory, TRL and ms-swift: what train.py says of them, "" where it has nothing to say
    "stage": "",
    "do_train": "",
    "template": "needs no flag",
    "cutoff_len": "--max_length_q",
    "max_seq_length": "--max_length_q",
    "dataset_dir": "",
    "overwrite_output_dir": "",
    "plot_loss": "",
    "bf16": "--dtype bfloat16",
    "fp16": "--dtype float16",
    "torch_dtype": "--dtype",
    "warmup_steps": "--warmup_ratio",
    "val_size": "--val_set_size",
    "preprocessing_num_workers": "",
    "checkpoint": "--resume RUN/checkpoint-N",
    "checkpoint_dir": "--model_save_dir",
    "resume_from_checkpoint": "--resume",
    "max_samples": "",
    "flash_attn": "--attn_implementation flash_attention_2",
    "per_device_eval_batch_size": "--eval_batch_size",
    "load_in_4bit": "--tuning qlora",
    "use_peft": "",
    "assistant_only_loss": "",
    "model_type": "",
    "train_type": "",
    "evaluation_strategy": "",
    "merge_lora": "",
}


@pytest.mark.parametrize("flag", HABITUAL)
def test_what_is_said_of_habitual_flags(capsys, flag):
    line = refusal(capsys, f"--{flag}", "x")
    told = line.partition(f"unrecognized argument --{flag}; ")[2]
    assert HABITUAL[flag] in told
    assert bool(HABITUAL[flag]) == ("lists all" not in told)


def test_an_adapter_is_named_by_habit_where_it_answers(tmp_path):
    for flags_class in (PredictFlags, EvaluationFlags, ServeFlags, ExportFlags):
        cfg, _ = parse(Config, flags_class, ["--adapter_name_or_path", str(tmp_path)])
        assert cfg.model_save_dir == str(tmp_path)


def test_in_train_it_is_where_the_run_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg, flags = parse(Config, TrainFlags, ["--adapter_name_or_path", "out"])
    assert flags.adapter_name_or_path == str(tmp_path / "out") != cfg.model_save_dir


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--lerning_rate 1", ["--lerning_rate", "--learning_rate"]),
        ("--lerning_rate=1", ["--lerning_rate", "--learning_rate"]),
        ("--learning-rate 1", ["--learning_rate"]),
        ("--max_step 3", ["--max_steps"]),
        ("--num_train_epoch 3", ["--num_train_epochs"]),
        ("--learning 1", ["--learning", "unrecognized"]),  # no abbreviations: they change meaning when a knob is added
        ("--xyzzy", ["--xyzzy", "--help"]),
        ("train.json", ["train.json"]),
        ("--query 你好", ["--query"]),  # predict.py's, not train.py's
        ("--lora_r x", ["--lora_r", "x", "int"]),
        ("--lora_r 1.5", ["--lora_r", "1.5"]),
        ("--max_steps 1e3", ["--max_steps", "1e3"]),
        ("--learning_rate fast", ["--learning_rate", "fast"]),
        ("--lora_r", ["--lora_r"]),
        ("--data_path", ["--data_path"]),
        ("--data_path ,", ["--data_path", "at least one"]),
        ("--target_modules ,", ["--target_modules", "at least one"]),
        ("--dtype fp8", ["--dtype", "fp8", "bfloat16"]),
        ("--loss_on everything", ["--loss_on", "everything", "answer"]),
        ("--prompt_style qwen", ["--prompt_style", "qwen", "chat"]),
        ("--strict maybe", ["--strict", "maybe", "true"]),
        ("--lora_r 0", ["--lora_r 0", "1 or more"]),
        ("--lora_rank 0", ["--lora_r 0", "1 or more"]),
        ("--max_steps 0", ["--max_steps 0", "-1 or at least 1"]),
        ("--max_steps -2", ["--max_steps -2"]),
        ("--val_set_size -1", ["--val_set_size -1", "0 or more"]),
        ("--val_set_size nan", ["--val_set_size nan"]),
        ("--val_set_size inf", ["--val_set_size inf"]),
        ("--learning_rate 0", ["--learning_rate 0", "above 0"]),
        ("--learning_rate nan", ["--learning_rate nan"]),
        ("--learning_rate inf", ["--learning_rate inf"]),
        ("--micro_batch_size 0", ["--micro_batch_size 0"]),
        ("--batch_size 0", ["--batch_size 0"]),
        ("--epochs 0", ["--epochs 0", "above 0"]),
        ("--epochs inf", ["--epochs inf"]),
        ("--max_length_q 0", ["--max_length_q 0"]),
        ("--lora_dropout 1", ["--lora_dropout 1", "below 1"]),
        ("--warmup_ratio 1.5", ["--warmup_ratio 1.5"]),
        ("--top_p 0", ["--top_p 0", "at most 1"]),
        ("--model_name a b c", ["--model_name", "a Chinese and another"]),
        ("--top_p 1.1", ["--top_p 1.1"]),
        ("--report_to mlflow", ["--report_to mlflow", "some of tensorboard wandb swanlab trackio"]),
        ("--optim adam", ["--optim adam", "adamw_torch_fused", "adamw_8bit", "apollo_adamw"]),
        ("--optim sgd --adam_beta1 0.8", ["--adam_beta1", "--optim sgd", "no effect"]),
        ("--optim galore_adamw", ["--optim galore_adamw", "--tuning full or freeze"]),
        ("--early_stopping_patience -1", ["--early_stopping_patience -1"]),
        ("--gradient_checkpointing maybe", ["--gradient_checkpointing", "maybe", "auto"]),
        ("--temperature 0", ["--temperature 0"]),
        ("--max_dropped 2", ["--max_dropped 2"]),
        ("--save_total_limit 1", ["--save_total_limit 1"]),
        ("--port 70000", ["--port 70000"]),
        ("--seed -1", ["--seed -1"]),
        ("--seed 4294967296", ["--seed 4294967296"]),
        ("--micro_batch_size 3 --batch_size 4", ["--batch_size 4", "use 6"]),
        ("--gradient_accumulation_steps 2 --batch_size 4", ["--gradient_accumulation_steps 2", "leave one out"]),
        ("--gradient_accumulation_steps 0", ["--gradient_accumulation_steps 0", "1 or more"]),
        ("--gradient_accumulation_steps x", ["--gradient_accumulation_steps", "int"]),
    ],
)
def test_wrong_command_lines(capsys, argv, words):
    line = refusal(capsys, *argv.split())
    assert [word for word in words if word not in line] == []


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("c.yaml", "lerning_rate: 1\n", ["lerning_rate", "--learning_rate"]),
        ("c.yaml", "query: x\n", ["query"]),
        ("c.yaml", "given: [seed]\n", ["given"]),
        ("c.yaml", "EMBEDDED: {}\n", ["EMBEDDED"]),
        ("c.yaml", "1: 2\n", ["unknown knob 1"]),
        ("c.yaml", 'lora_r: "4"\n', ["lora_r", "'4'", "int"]),
        ("c.yaml", "lora_r: 4.5\n", ["lora_r", "4.5", "int"]),
        ("c.yaml", "lora_r: true\n", ["lora_r", "True", "int"]),
        ("c.yaml", "lora_r:\n", ["lora_r", "None"]),
        ("c.yaml", "learning_rate: fast\n", ["learning_rate", "'fast'", "float"]),
        ("c.yaml", "learning_rate: true\n", ["learning_rate", "True"]),
        ("c.yaml", "strict: 1\n", ["strict", "bool"]),
        ("c.yaml", "dtype: fp8\n", ["dtype", "fp8", "bfloat16"]),
        ("c.yaml", "target_modules: [1]\n", ["target_modules", "[1]"]),
        ("c.yaml", "data_path: []\n", ["data_path", "at least one"]),
        ("c.yaml", "lora_rank: 0\n", ["--lora_r 0", "1 or more"]),
        ("c.yaml", "learning_rate: .nan\n", ["--learning_rate nan"]),
        ("c.yaml", "micro_batch_size: 3\nbatch_size: 4\n", ["--batch_size 4", "use 6"]),
        ("c.yaml", "epochs: 1\nseed: 2\nepochs: 5\n", ["epochs", "occurs twice"]),
        ("c.json", '{"epochs": 1, "seed": 2, "epochs": 5}', ["epochs", "occurs twice"]),
        ("c.yaml", "learning_rate: 1e-4\nlr: 3e-4\n", ["lr", "is learning_rate", "given too"]),
        ("c.yaml", "", ["mapping"]),
        ("c.yaml", "- seed\n", ["mapping"]),
        ("c.yaml", "seed: [\n", ["not valid YAML"]),
        ("c.yaml", "\tseed: 1\n", ["not valid YAML"]),
        ("c.yaml", "seed: !!python/name:os.system\n", ["not valid YAML"]),
        ("c.json", '{"seed": 1', ["cannot be read"]),
        ("c.json", "", ["cannot be read"]),
        ("c.json", "[1]", ["mapping"]),
        ("c.json", '{"模型": 1}'.encode("gb18030"), ["cannot be read", "utf-8"]),
    ],
)
def test_wrong_config_files(capsys, tmp_path, name, content, words):
    file = write(tmp_path, name, content)
    line = refusal(capsys, "--config", file)
    assert [word for word in words if word not in line] == []


@pytest.mark.parametrize("name", ["nothing.yaml", "nothing.json", "."])
def test_a_config_file_that_is_not_there_is_named(capsys, tmp_path, name):
    assert str(tmp_path / name) in refusal(capsys, "--config", tmp_path / name)


# ---------------------------------------------------------------- the recipes as processes


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_refuses_a_wrong_flag(recipe, tmp_path, name):
    done = recipe(f"{name}.py", "--lerning_rate", 1)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(f"{name}.py: ") and "--learning_rate" in done.stderr
    assert list(tmp_path.iterdir()) == []


def comments(cls):
    """Each field's own comment in the source of `cls` and its parents, found by the tokenizer: {name: text}."""
    found = {}
    for parent in reversed(cls.__mro__[:-1]):
        source = inspect.getsource(parent)
        words = tokenize.generate_tokens(io.StringIO(source).readline)
        notes = {word.start[0]: word.string.lstrip("# ") for word in words if word.type == tokenize.COMMENT}
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                lines = range(node.lineno, node.end_lineno + 1)
                found[node.target.id] = " ".join(notes[line] for line in lines if line in notes)
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_help_explains_every_knob_and_imports_nothing_heavy(environment, tmp_path, name):
    command = [sys.executable, "-X", "importtime", str(ROOT / f"gemma_sft/ft_gemma/{name}.py"), "--help"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment | {"COLUMNS": "1000"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "common.config" in imported
    heavy = {"torch", "transformers", "datasets", "peft", "accelerate", "numpy", "pyarrow", "flask", "matplotlib"}
    assert {module.partition(".")[0] for module in imported} & heavy == set()

    entries = {}
    for block in re.split(r"\n(?=  -)", done.stdout):
        if flag := re.match(r"  --(\w+)", block):
            entries[flag[1]] = " ".join(block.split())
    texts = comments(Config) | comments(RECIPES[name])
    knobs = [field.name for cls in (Config, RECIPES[name]) for field in fields(cls) if not field.metadata.get("hidden")]
    assert entries.keys() == {"config", STEPS, *knobs}
    unexplained = [knob for knob in knobs if len(texts[knob]) < 3 or texts[knob] not in entries[knob]]
    assert unexplained == []
    assert "--learning_rate X, --lr X" in entries["learning_rate"]
    assert list(tmp_path.iterdir()) == []


PROBE = """
import os, sys

seen = []
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def hook(event, args):
    if event == "open" and isinstance(args[0], str):
        code = args[0].endswith((".py", ".pyc"))
        if (args[2] & WRITES) or (args[0].startswith(sys.argv[1]) and not code):
            seen.append(args[0])
    elif event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "subprocess.Popen", "socket.connect"):
        seen.append(f"{event} {args}")


sys.path.insert(0, sys.argv[1])
before = list(sys.path)
sys.addaudithook(hook)
import gemma_sft.ft_gemma.train, gemma_sft.ft_gemma.predict
import gemma_sft.ft_gemma.evaluation, gemma_sft.ft_gemma.post_api

seen += [name for name in ("torch", "transformers", "datasets") if name in sys.modules]
seen += [f"sys.path {path}" for path in sys.path if path not in before]
if seen:
    raise SystemExit("\\n".join(map(str, seen)))
"""


def test_importing_the_recipes_does_nothing(environment, tmp_path):
    command = [sys.executable, "-B", "-c", PROBE, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
