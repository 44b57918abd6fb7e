"""Whole runs on a small model that thinks and calls: it learns both, and a run's mode is what it is asked in."""

import json

import pytest
import torch
from test_chat_templates import TOOLS, needs_trl, official_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.cli import parse
from common.config import PredictFlags
from common.conversation import thinking
from common.conversation.turns import Call, Turn
from common.errors import UserError
from common.serving import adapters
from qwen2_sft import prompt
from qwen2_sft.ft_qwen2 import export, predict, train
from qwen2_sft.ft_qwen2.config import Config

pytestmark = [needs_trl, pytest.mark.slow]
OFFER = Turn("system", "", tools=json.dumps(TOOLS))
ARGUMENTS = {"c": "x"}
CALLING = Turn("assistant", "", thought="要问", calls=(Call("w", json.dumps(ARGUMENTS)),))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a random Qwen3ForCausalLM of 90,000 parameters, and a tokenizer with Qwen3's template."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("small_qwen3")
    tokenizer, _ = official_tokenizer("qwen3")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of rows that think before an answer, and that call a tool and tell its result."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    call = [{"type": "function", "function": {"name": "w", "arguments": ARGUMENTS}}]
    talks = []
    for number in range(20):
        asked = {"role": "user", "content": f"有{number % 10}"}
        talks.append({"messages": [asked, {"role": "assistant", "content": "<think>\n是\n</think>\n\n是的"}]})
        asked = {"role": "user", "content": f"他{number % 10}"}
        calling = {"role": "assistant", "content": None, "reasoning_content": "要问", "tool_calls": call}
        told = [{"role": "tool", "content": "1"}, {"role": "assistant", "content": "不是"}]
        talks.append({"messages": [asked, calling, *told], "tools": TOOLS})
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks), encoding="utf-8")
    return path


def trained(base, rows, folder, *more):
    flags = ["--path_model_pretrain", base, "--data_path", rows, "--eval_rows", 0, "--max_length_q", 1200]
    flags += ["--cache_dir", folder.parent / "cache", "--model_save_dir", folder, "--loss_on", "answer"]
    train.main([str(flag) for flag in [*flags, "--val_set_size", 0, *more]])
    return folder


@pytest.fixture(scope="module")
def run(base, rows, tmp_path_factory):
    """A run of all weights, which has learnt the rows."""
    how = ["--tuning", "full", "--learning_rate", 0.01, "--max_steps", 160, "--logging_steps", 10]
    return trained(base, rows, tmp_path_factory.mktemp("run") / "out", *how)


@pytest.fixture(scope="module")
def without(base, rows, tmp_path_factory):
    """A run that was trained without thoughts, hardly."""
    return trained(base, rows, tmp_path_factory.mktemp("without") / "out", "--max_steps", 1, "--thinking", "none")


def load(folder, *flags):
    return predict.load_answer(parse(Config, PredictFlags, ["--model_save_dir", str(folder), *map(str, flags)])[0])


def said(answer, turns):
    """What the model says to turns, greedily, with its control tokens."""
    ids = torch.tensor([answer.fitted_ids(turns)])
    with torch.no_grad():
        found = answer.net.generate(
            ids, max_new_tokens=80, do_sample=False, eos_token_id=answer.stop_ids, pad_token_id=0
        )
    return answer.tokenizer.decode(found[0, ids.shape[1] :])


def test_it_learns_to_think_to_call_and_to_use_the_result(run):
    log = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < losses[0] / 20
    answer = load(run, "--max_length_q", 1200)
    assert said(answer, [Turn("user", "有3")]) == "<think>\n是\n</think>\n\n是的<|im_end|>"
    called = '<tool_call>\n{"name": "w", "arguments": {"c": "x"}}\n</tool_call>'
    asked = [OFFER, Turn("user", "他4")]
    assert said(answer, asked) == f"<think>\n要问\n</think>\n\n{called}<|im_end|>"
    assert said(answer, [*asked, CALLING, Turn("tool", "1")]) == "<think>\n\n</think>\n\n不是<|im_end|>"


def test_a_run_is_asked_in_its_own_mode(run, without, capsys):
    for folder, end in ((run, "assistant\n"), (without, "<think>\n\n</think>\n\n")):
        capsys.readouterr()
        predict.main(["--model_save_dir", str(folder), "--print_prompt", "有3"])
        assert json.loads(capsys.readouterr().out)["text"].endswith(end)
    assert json.loads((without / "run_manifest.json").read_text())["config"]["thinking"] == "none"
    for folder, mode, theirs in ((run, "none", "auto"), (without, "keep", "none")):
        with pytest.raises(UserError, match=f"--thinking {mode}: .*was trained with {theirs}; leave the flag out"):
            load(folder, "--thinking", mode)


def test_no_thought_is_in_a_row_of_a_run_without(without):
    tokens = json.loads((without / "run_manifest.json").read_text())["data"][0]
    assert tokens["kept"] == 40
    answer = load(without)
    shown = prompt.render(answer.tokenizer, [OFFER, Turn("user", "他4"), CALLING], "chat")
    assert "要问" not in answer.tokenizer.decode([id_ for piece in shown for id_ in piece.ids])


def test_a_base_that_was_never_taught_calls_trains_their_rows(base, rows, tmp_path, capsys):
    """As Qwen2.5's: the rows of its calls' marks are those of all unused tokens."""
    untaught, tokenizer = tmp_path / "base", AutoTokenizer.from_pretrained(base)
    marks = tokenizer.convert_tokens_to_ids(["<tool_call>", "</tool_call>"])
    net = AutoModelForCausalLM.from_pretrained(base)
    net.get_input_embeddings().weight.data[marks] = net.get_input_embeddings().weight.data[-1].clone()
    net.save_pretrained(untaught)
    tokenizer.save_pretrained(untaught)
    capsys.readouterr()
    folder = trained(untaught, rows, tmp_path / "out", "--max_steps", 1)
    assert "<tool_call> 1.000, </tool_call> 1.000; 也训练 their rows are trained too" in capsys.readouterr().out
    assert json.loads((folder / "adapter_config.json").read_text())["trainable_token_indices"] == {
        "model.embed_tokens": marks
    }


def test_what_is_exported_asks_in_the_runs_mode(without, tmp_path):
    from transformers import AutoTokenizer

    export.main(["--model_save_dir", str(without), "--output_dir", str(tmp_path / "whole"), "--dtype", "float32"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "有3"}], add_generation_prompt=True)["input_ids"]
    assert ids == load(without).fitted_ids([Turn("user", "有3")])
    assert thinking.leaves_out(tokenizer), "it stays so where it is the base of another run"


def test_a_run_that_thinks_otherwise_is_no_adapter_beside_another(base, without):
    assert list(adapters.load(load(without), [f"same={without}"])) == ["tuned", "base", "same"]
    auto = predict.load_answer(Config(path_model_pretrain=str(base), model_save_dir="/nowhere"), base=True)
    with pytest.raises(UserError, match="trained with --thinking none"):
        adapters.load(auto, [f"other={without}"], "base")


def test_an_adapter_is_trained_on_in_its_mode_or_another(base, rows, without, tmp_path, capsys):
    start = ["--adapter_name_or_path", without, "--max_steps", 1]
    for name, more, mode in (("same", [], "none"), ("other", ["--thinking", "auto"], "auto")):
        given = ["--path_model_pretrain", base, "--data_path", rows, "--eval_rows", 0, "--max_length_q", 1200]
        given += ["--val_set_size", 0, "--model_save_dir", tmp_path / name, "--cache_dir", tmp_path / "cache"]
        train.main([str(flag) for flag in [*given, *start, *more]])
        assert json.loads((tmp_path / name / "run_manifest.json").read_text())["config"]["thinking"] == mode
    assert "thinking none" in capsys.readouterr().out


def test_rows_of_which_the_template_shows_less_are_left_out_and_told(small_qwen, rows, tmp_path, capsys):
    with pytest.raises(UserError, match="没有可用的数据.*the chat template does not show the t"):
        trained(small_qwen, rows, tmp_path / "out")
    with pytest.raises(UserError, match="--thinking keep: .*its chat template shows no thought"):
        trained(small_qwen, rows, tmp_path / "out", "--thinking", "keep")
