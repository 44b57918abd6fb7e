"""configs/recipes: each is whole, goes with every family, and gives way to its user; train.py --recipe runs it."""

import importlib
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, NamedTuple

import pytest
import yaml

from common import knob_files
from common.cli import parse
from common.config import PredictFlags, SFTConfig, TrainFlags
from common.data import dataset
from common.errors import UserError
from common.model import loading

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs/recipes"
TASKS, SIZES = ("identity", "products", "entities", "chat"), ("laptop", "24gb", "8gpu")
NAMES = [f"{task}-{size}" for task in TASKS for size in SIZES]
OF_SIZE = set(  # what a recipe may have otherwise than the others of its task; data_path in its #N alone
    "val_set_size eval_rows max_length_q max_length_a tuning quantization_bit micro_batch_size batch_size "
    "gradient_checkpointing save_steps".split()
)
HUB = ("--path_model_pretrain", "a/b")
NAMED = ("--model_name", "小黄", "Xiao Huang", "--model_author", "魔搭", "ModelScope")


@dataclass(frozen=True)
class Toy(SFTConfig):
    """A family made here, so that its values are literals of this file."""

    learning_rate: float = 0.25  # the family's

    EMBEDDED: ClassVar[dict] = {"learning_rate": 0.5, "lora_r": 2, "target_modules": ("three",)}


class Family(NamedTuple):
    package: str
    recipes: str  # its scripts
    fixture: str


FAMILIES = {
    "gemma": Family("gemma_sft", "ft_gemma", "small_gemma"),
    "qwen": Family("qwen2_sft", "ft_qwen2", "small_qwen"),
    "chatglm": Family("chatglm_sft", "ft_chatglm", "small_chatglm"),
    "glm4": Family("chatglm_sft", "ft_glm4", "small_glm4"),
}


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """No launcher's variable reaches these tests."""
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """own(text) makes it the one recipe there is, named `own`."""
    monkeypatch.setattr(knob_files, "RECIPES", tmp_path / "recipes")
    (tmp_path / "recipes").mkdir()
    return (tmp_path / "recipes/own.yaml").write_text


def module(family, name):
    return importlib.import_module(f"{family.package}.{family.recipes}.{name}")


def config_of(family):
    return module(family, "config").Config


def settle(*argv, family=Toy):
    """The config of a command line, as train.py has it."""
    return parse(family, TrainFlags, [str(word) for word in argv])[0]


def refusal(capsys, *argv):
    """The one line a refused command line leaves on stderr."""
    with pytest.raises(SystemExit) as stop:
        settle(*argv)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1), err
    return err


def values_of(name):
    """A recipe's knobs as its file says them, numbers as numbers."""
    values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return values | {"learning_rate": float(values["learning_rate"])}


# ---------------------------------------------------------------- the files


def test_there_is_one_for_each_task_and_size():
    assert sorted(file.name for file in FOLDER.iterdir()) == sorted(f"{name}.yaml" for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_says_what_it_is_for_how_it_is_called_and_what_it_gave(name):
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    head = re.match(r"(#.*\n)+", text)[0]
    command = next(line for line in head.splitlines() if "train.py" in line)
    assert f"--recipe {name} --path_model_pretrain" in command and "--model_save_dir out" in command
    assert command.startswith("# torchrun --nproc_per_node 8 " if "8gpu" in name else "# python ")
    assert ("--model_name" in command) == name.startswith("identity")
    assert "# measured: " in head and len(text.splitlines()) <= 40


@pytest.mark.parametrize("name", NAMES)
def test_each_goes_with_every_family(name, family):
    config = settle("--recipe", name, *HUB, family=config_of(family))
    values = values_of(name)
    for knob in ("data_path", "eval_data_path"):
        values[knob] = [str(ROOT / path) for path in values[knob]]
        assert all((ROOT / path.partition("#")[0]).is_file() for path in values[knob])
    assert {knob: getattr(config, knob) for knob in values} == {
        knob: tuple(value) if isinstance(value, list) else value for knob, value in values.items()
    }
    assert config.recipe == name and config.accumulation * config.micro_batch_size == config.batch_size
    assert (config.loss_on, config.target_modules) == ("answer", ("all-linear",))


@pytest.mark.parametrize("name", [name for name in NAMES if "8gpu" in name])
def test_eight_processes_share_its_batch(name, family, monkeypatch):
    alone = settle("--recipe", name, *HUB, family=config_of(family))
    steps = alone.accumulation
    monkeypatch.setenv("WORLD_SIZE", "8")
    shared = settle("--recipe", name, *HUB, family=config_of(family))
    assert (shared.batch_size, shared.micro_batch_size) == (alone.batch_size, alone.micro_batch_size)
    assert steps == 8 * shared.accumulation


@pytest.mark.parametrize("task", TASKS)
def test_those_of_a_task_differ_in_size_alone(task):
    first, *others = [values_of(f"{task}-{size}") for size in SIZES]
    for other in others:
        assert (first.keys() ^ other.keys()) <= OF_SIZE
        differing = {knob for knob in first.keys() & other.keys() if first[knob] != other[knob]}
        assert differing - OF_SIZE <= {"data_path"}
        assert [path.partition("#")[0] for path in first["data_path"]] == [
            path.partition("#")[0] for path in other["data_path"]
        ]


def test_help_names_the_tasks_and_sizes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        settle("--help")
    line = re.search(r"--recipe TEXT +(.+)", capsys.readouterr().out)[1]
    assert set(re.findall(r"[\w]+", line)) >= {*TASKS, *SIZES}


# ---------------------------------------------------------------- which value wins


def test_a_recipe_stands_between_config_py_and_a_file(own, tmp_path):
    own("lora_r: 5\nlora_alpha: 5\nwarmup_ratio: 0.5\n")
    file = tmp_path / "c.yaml"
    file.write_text("recipe: own\nlora_alpha: 6\nwarmup_ratio: 0.25\n")
    config = settle("--config", file, "--warmup_ratio", 0.125, *HUB)
    assert (config.seed, config.learning_rate) == (42, 0.25)  # of common/config.py and of the family
    assert (config.lora_r, config.lora_alpha, config.warmup_ratio) == (5, 6, 0.125)
    assert settle("--recipe", "own", *HUB).lora_alpha == 5


def test_its_paths_are_those_of_the_project(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own("data_path: [a.jsonl#3, 'https://a/b.jsonl']\neval_data_path: data/e.jsonl\n")
    config = settle("--recipe", "own", *HUB)
    assert config.data_path == (str(ROOT / "a.jsonl#3"), "https://a/b.jsonl")
    assert config.eval_data_path == (str(ROOT / "data/e.jsonl"),)


def test_its_held_out_rows_belong_to_its_data(tmp_path):
    mine = ("--recipe", "products-laptop", "--data_path", tmp_path / "my.jsonl")
    assert settle("--recipe", "products-laptop").eval_data_path == (str(ROOT / "data/product_heldout.jsonl"),)
    assert settle(*mine).data_path == (str(tmp_path / "my.jsonl"),) and settle(*mine).eval_data_path == ()
    assert settle(*mine, "--eval_data_path", tmp_path / "e").eval_data_path == (str(tmp_path / "e"),)


@pytest.mark.parametrize(
    ("world", "argv", "batch", "micro"),
    [
        (1, [], 8, 4),
        (1, ["--batch_size", 6], 6, 3),
        (1, ["--micro_batch_size", 6], 12, 6),
        (1, ["--gradient_accumulation_steps", 3], 12, 4),
        (4, [], 8, 2),
        (16, [], 64, 4),
    ],
)
def test_its_batches_give_way(own, monkeypatch, world, argv, batch, micro):
    own("batch_size: 8\nmicro_batch_size: 4\n")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    config = settle("--recipe", "own", *argv, *HUB)
    assert (config.batch_size, config.micro_batch_size) == (batch, micro)


def test_the_embedded_base_has_its_own_values(own, capsys):
    own("learning_rate: 2e-4\nlora_r: 16\ntarget_modules: [three]\nwarmup_ratio: 0.5\n")
    config = settle("--recipe", "own")
    assert {name: getattr(config, name) for name in Toy.EMBEDDED} == Toy.EMBEDDED and config.warmup_ratio == 0.5
    out, err = capsys.readouterr()
    assert out.startswith("配方 recipe own: 未采用 left out: learning_rate lora_r (") and "embedded base" in out
    assert (out.count("\n"), err) == (1, "")
    settle("--recipe", "own", "--learning_rate", 0.5, "--lora_r", 3)
    assert capsys.readouterr() == ("", "")


def test_what_is_left_out_is_told_once_and_never_into_json(own, capsys, monkeypatch):
    own("lora_r: 16\n")
    settle("--recipe", "own", "--check", "--json")
    out, err = capsys.readouterr()
    assert out == "" and "left out: lora_r" in err
    monkeypatch.setenv("RANK", "1")
    settle("--recipe", "own")
    assert capsys.readouterr() == ("", "")


def test_all_weights_on_top_of_a_recipe(capsys):
    config = settle("--recipe", "products-24gb", "--tuning", "full", *HUB)
    assert config.tuning == "full" and config.learning_rate == pytest.approx(2e-5)
    out = capsys.readouterr().out
    assert "left out: quantization_bit target_modules lora_r lora_alpha lora_dropout (" in out
    assert "--tuning full" in out and out.count("\n") == 1
    assert settle("--recipe", "products-24gb", "--tuning", "full", "--lr", 1e-3, *HUB).learning_rate == 1e-3


def test_of_its_values_tuning_alone_counts_as_set():
    """A run that starts from an adapter takes rank and layers from it, but stays in the bits that fit the card."""
    assert settle("--recipe", "chat-24gb", *HUB).given == {"recipe", "path_model_pretrain", "tuning"}


def test_knobs_typed_beside_a_recipe_are_still_judged(capsys):
    line = refusal(capsys, "--recipe", "chat-laptop", "--tuning", "full", "--lora_r", 4, *HUB)
    assert "--lora_r" in line and "no effect" in line


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "words", "not_said"),
    [
        ("chat-latop", ["chat-latop", "did you mean chat-laptop ?", *NAMES], "xyzzy"),
        ("xyzzy", ["xyzzy", *NAMES, "--config"], "did you mean"),
        ("", ["no such recipe", *NAMES], "did you mean"),
        ("../recipes/chat-laptop", ["no such recipe"], "xyzzy"),
    ],
)
def test_a_name_that_is_none(capsys, name, words, not_said):
    line = refusal(capsys, "--recipe", name)
    assert [word for word in words if word not in line] == [] and not_said not in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lerning_rate: 1\n", ["--recipe", "own.yaml", "lerning_rate", "--learning_rate"]),
        ("recipe: chat-laptop\n", ["unknown knob recipe"]),
        ("check: true\n", ["unknown knob check"]),  # knobs alone
        ("gradient_accumulation_steps: 2\n", ["unknown knob gradient_accumulation_steps"]),
        ("lora_r: 0\n", ["--lora_r 0", "1 or more"]),
        ("lora_r: four\n", ["own.yaml", "lora_r", "'four'", "int"]),
        ("- seed\n", ["mapping"]),
    ],
)
def test_a_recipe_that_is_wrong(own, capsys, text, words):
    own(text)
    line = refusal(capsys, "--recipe", "own")
    assert [word for word in words if word not in line] == []


def test_it_belongs_to_train_alone(capsys):
    with pytest.raises(SystemExit):
        parse(Toy, PredictFlags, ["--recipe", "chat-laptop"])
    assert "unrecognized argument --recipe" in capsys.readouterr().err


def test_no_recipe_holds_what_is_the_users():
    knobs = {field.name for field in fields(SFTConfig)}
    for name in NAMES:
        found = values_of(name).keys()
        assert found <= knobs
        assert not found & {"model_name", "model_author", "path_model_pretrain", "model_save_dir", "deepspeed"}


# ---------------------------------------------------------------- what they do


def test_every_identity_row_is_learnt(family, request, tmp_path):
    """Their strictness finds nothing to refuse where both names are given, and says so where one is missing."""
    base, prompt = request.getfixturevalue(family.fixture), module(family, "predict").prompt
    argv = ("--recipe", "identity-laptop", "--path_model_pretrain", base, "--cache_dir", tmp_path / "cache")
    tokenizer = loading.load_tokenizer(str(base), prompt)
    rows = dataset.prepare(settle(*argv, *NAMED, family=config_of(family)), tokenizer, prompt)
    assert [source["kept"] for source in rows.sources] >= [172, 600] and len(rows.validation) >= 25
    for without in (NAMED[:3], NAMED[3:]):
        with pytest.raises(UserError, match="is not filled: give --model_name and --model_author"):
            dataset.prepare(settle(*argv, *without, family=config_of(family)), tokenizer, prompt)


@pytest.mark.parametrize("family", [own for own in FAMILIES.values() if own.recipes != "ft_glm4"], indirect=True)
def test_a_short_run_on_the_embedded_base(family, tmp_path, capsys):
    lines = (ROOT / "data/product_train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "my.jsonl").write_text("".join(lines[:40]), encoding="utf-8")
    words = ["--recipe", "products-laptop", "--data_path", str(tmp_path / "my.jsonl"), "--max_steps", "2"]
    words += [
        "--eval_rows",
        "1",
        "--max_new_tokens",
        "4",
        "--cache_dir",
        str(tmp_path / "cache"),
        "--model_save_dir",
        str(tmp_path / "out"),
    ]
    module(family, "train").main(words)
    manifest = json.loads((tmp_path / "out/run_manifest.json").read_text(encoding="utf-8"))
    knobs, embedded = manifest["config"], config_of(family).EMBEDDED
    assert manifest["recipe"] == "products-laptop" and "recipe" not in knobs
    assert (knobs["learning_rate"], knobs["batch_size"]) == (embedded["learning_rate"], embedded["batch_size"])
    assert (knobs["val_set_size"], knobs["save_steps"]) == (0.1, 40)
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    assert "left out: eval_rows" not in (out := capsys.readouterr().out) and "left out: " in out


def test_an_adapter_to_start_from_keeps_its_shape(small_gemma, tmp_path, capsys):
    """The recipe's rank is no rank its user asked for."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"query": f"{n}+1=", "response": str(n + 1)}) + "\n" for n in range(20)))
    train = module(FAMILIES["gemma"], "train").main
    words = ["--path_model_pretrain", str(small_gemma), "--data_path", str(rows), "--max_steps", "1"]
    words += ["--eval_rows", "0", "--cache_dir", str(tmp_path / "cache")]
    train([*words, "--lora_r", "3", "--model_save_dir", str(tmp_path / "one")])
    start = ["--adapter_name_or_path", str(tmp_path / "one")]
    train([*words, *start, "--recipe", "chat-laptop", "--model_save_dir", str(tmp_path / "two")])
    knobs = json.loads((tmp_path / "two/run_manifest.json").read_text(encoding="utf-8"))["config"]
    assert (knobs["lora_r"], set(knobs["target_modules"])) == (3, {"q_proj", "k_proj", "v_proj"})
    assert (knobs["lora_dropout"], knobs["batch_size"]) == (0.05, 8)
