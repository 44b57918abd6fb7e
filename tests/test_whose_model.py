"""A model given to the recipes of another family: one line that names its own; no base at all is one line too."""

import importlib
import json
import shutil

import pytest
from transformers import AutoTokenizer

from common.errors import UserError, run_main
from common.model import loading

FAMILIES = {  # folder of a small model: recipes, as packages
    "small_gemma": "gemma_sft.ft_gemma",
    "small_qwen": "qwen2_sft.ft_qwen2",
    "small_chatglm": "chatglm_sft.ft_chatglm",
    "small_chatglm2": "chatglm_sft.ft_chatglm2",
    "small_chatglm3": "chatglm_sft.ft_chatglm3",
    "small_glm4": "chatglm_sft.ft_glm4",
}
RECIPES = list(FAMILIES.values())
WRONG = [(recipes, name) for recipes in RECIPES for name in FAMILIES if FAMILIES[name] != recipes]
GLM4 = "chatglm_sft.ft_glm4"
FEW = ["train", "predict", "evaluation", "post_api"]


def prompt_of(recipes):
    return importlib.import_module(f"{recipes}.predict").prompt


@pytest.fixture
def line_of(capfd):
    """line_of(recipe, *flags): how a recipe ends, its only line."""

    def run(recipe, *flags):
        main = importlib.import_module(recipe).main
        with pytest.raises(SystemExit) as ended:
            run_main(lambda: main([str(flag) for flag in flags]))
        out, err = capfd.readouterr()
        assert (ended.value.code, err.count("\n")) == (1, 1), err
        return err.removeprefix("错误 error: ").rstrip()

    return run


@pytest.fixture
def typed(request, tmp_path):
    """typed(name, model_type): a copy of a small model's folder that calls itself so."""

    def make(name, model_type):
        folder = shutil.copytree(request.getfixturevalue(name), tmp_path / "typed")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
        return folder

    return make


@pytest.mark.parametrize(("recipes", "name"), WRONG)
def test_another_familys_model_is_told_where_it_belongs(request, recipes, name):
    folder, own = request.getfixturevalue(name), FAMILIES[name].replace(".", "/")
    with pytest.raises(UserError) as refused:
        loading.load_tokenizer(folder, prompt_of(recipes))
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    assert str(refused.value) == (
        f"{folder}: 是别的家族的模型 is a {kind} model, of another family: its recipes are in {own}, "
        f"such as python {own}/train.py"
    )


def test_chatglm_is_told_apart_where_transformers_does_not_know_it(recipe, small_chatglm, tmp_path):
    """In a process that has not imported its model."""
    flags = ["--path_model_pretrain", small_chatglm, "--print_prompt", "你好"]
    done = recipe("predict.py", *flags, family="qwen2_sft/ft_qwen2")
    assert done.returncode == 1 and "python chatglm_sft/ft_chatglm/train.py" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("recipe_name", FEW)
def test_each_recipe_says_so(line_of, small_glm4, tmp_path, recipe_name):
    (tmp_path / "rows.jsonl").write_text('{"query": "1", "response": "2"}\n')
    flags = ["--path_model_pretrain", small_glm4, "--model_save_dir", tmp_path / "out"]
    flags += [] if recipe_name == "post_api" else ["--data_path", tmp_path / "rows.jsonl"]
    flags += ["--cache_dir", tmp_path / "cache"] if recipe_name == "train" else ["--base"]
    assert "python chatglm_sft/ft_glm4/train.py" in line_of(f"chatglm_sft.ft_chatglm.{recipe_name}", *flags)
    assert not (tmp_path / "out").exists()


def test_a_type_no_recipe_names_is_taken_by_its_tokens(typed):
    folder = typed("small_qwen", "llama")
    assert loading.load_tokenizer(folder, prompt_of("qwen2_sft.ft_qwen2"))
    with pytest.raises(UserError, match="no <start_of_turn>|no <end_of_turn>") as refused:
        loading.load_tokenizer(folder, prompt_of("gemma_sft.ft_gemma"))
    assert "is it a model of this family?" in str(refused.value)


def test_a_model_that_speaks_this_template_is_taken_whatever_its_type(typed):
    """As one that was given another family's tokenizer and trained anew."""
    folder = typed("small_gemma", "qwen2")
    assert loading.load_tokenizer(folder, prompt_of("gemma_sft.ft_gemma"))


@pytest.mark.parametrize("name", FAMILIES)
def test_each_model_is_its_own_recipes(request, name):
    if name == "small_chatglm":
        importlib.import_module("chatglm_sft.models.chatglm")
    assert loading.load_tokenizer(request.getfixturevalue(name), prompt_of(FAMILIES[name]))


def test_no_type_has_two_families():
    named = [kind for recipes in RECIPES for kind in prompt_of(recipes).MODEL_TYPES]
    assert len(named) == len(set(named)) and all(prompt_of(r).RECIPES == r.replace(".", "/") for r in RECIPES)


# ---------------------------------------------------------------- no base


@pytest.mark.parametrize("recipe_name", FEW)
@pytest.mark.parametrize("given", [[], ["--path_model_pretrain", "embedded"]], ids=["none", "embedded"])
def test_recipes_that_ship_no_base_ask_for_one(line_of, tmp_path, recipe_name, given):
    flags = ["--model_save_dir", tmp_path / "out", *given]
    flags += [] if recipe_name == "train" else ["--base"]
    line = line_of(f"{GLM4}.{recipe_name}", *flags)
    assert line.startswith("--path_model_pretrain: 没有给出基座模型 no base model is given, and none is shipped")
    assert line.endswith("such as --path_model_pretrain THUDM/GLM-4-9B-0414")


def test_the_run_knows_its_base(small_glm4, tmp_path, capsys):
    """predict.py, evaluation.py, post_api.py and export.py need no base: the run's is taken."""
    train, predict = (importlib.import_module(f"{GLM4}.{name}") for name in ("train", "predict"))
    (tmp_path / "rows.jsonl").write_text('{"query": "1", "response": "2"}\n')
    flags = ["--path_model_pretrain", small_glm4, "--data_path", tmp_path / "rows.jsonl", "--max_steps", 1]
    flags += ["--eval_rows", 0, "--val_set_size", 0, "--cache_dir", tmp_path / "cache"]
    train.main([str(flag) for flag in [*flags, "--model_save_dir", tmp_path / "out"]])
    capsys.readouterr()
    predict.main(["--model_save_dir", str(tmp_path / "out"), "--query", "1", "--max_new_tokens", "2"])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
