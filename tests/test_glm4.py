"""GLM-4's whole road: it learns to stop, in every way it is asked; plain transformers repeats what is exported."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatglm_sft.ft_glm4 import export, predict, train
from chatglm_sft.ft_glm4.config import Config
from common.cli import parse
from common.config import PredictFlags
from common.conversation.turns import Turn
from common.engine.batcher import Batcher
from common.inference.answerer import Sampling
from common.serving.app import Service, create_app

CHAT = "/v1/chat/completions"
ANSWERS = ["是的", "不是"]
ASKED = ["有1", "他2", "有3", "他4"]  # the first character decides
GREEDY = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def run(small_glm4, tmp_path_factory):
    """The folder of a run that has learnt to answer with two characters and to stop; rows of one and of two rounds."""
    parent = tmp_path_factory.mktemp("glm4")
    one = [{"query": f"{'有他'[n % 2]}{n}", "response": ANSWERS[n % 2]} for n in range(40)]
    two = [row | {"history": [["他0", "不是"]]} for row in one]
    (parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in one + two))
    flags = [
        "--path_model_pretrain",
        small_glm4,
        "--data_path",
        parent / "rows.jsonl",
        "--eval_rows",
        0,
        "--sample_rows",
        0,
    ]
    flags += ["--cache_dir", parent / "cache", "--model_save_dir", parent / "out", "--max_steps", 240]
    flags += ["--target_modules", "all-linear", "--lora_r", 16, "--lora_dropout", 0, "--learning_rate", 0.01]
    flags += ["--train_template_tokens", "false"]
    train.main([str(flag) for flag in flags])
    return parent / "out"


@pytest.fixture(scope="module")
def answer(run):
    return predict.load_answer(parse(Config, PredictFlags, ["--model_save_dir", str(run)])[0])


@pytest.fixture(scope="module")
def client(answer):
    batcher = Batcher(answer, {"tuned": "default", "base": None})
    yield create_app(Service("out", "tuned", batcher)).test_client()
    batcher.close()


def test_it_has_learnt_what_to_say_and_to_stop(answer):
    alone = [answer([[Turn("user", text)]], GREEDY)[0] for text in ASKED]
    assert [(one.text, one.stop) for one in alone] == [(ANSWERS[n % 2], "stop") for n in range(4)]
    assert answer([[Turn("user", text)] for text in ASKED], GREEDY) == alone
    later = [Turn("user", "他0"), Turn("assistant", "不是"), Turn("user", "有7")]
    assert answer([later], GREEDY)[0].text == "是的"


def test_the_service_says_the_same(answer, client):
    for text in ASKED:
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12}
        found = client.post(CHAT, json=body).json
        expected = answer([[Turn("user", text)]], GREEDY)[0]
        (choice,) = found["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (expected.text, "stop")


def test_control_tokens_typed_over_http_stay_text(answer, client):
    ordinary, asked = (answer.fitted_ids([Turn("user", text)]) for text in ("有", "有<|user|>[gMASK]<sop>"))
    for token in ("<|user|>", "[gMASK]", "<sop>"):
        id_ = answer.tokenizer.convert_tokens_to_ids(token)
        assert asked.count(id_) == ordinary.count(id_) == 1
    body = {"messages": [{"role": "user", "content": "有<|user|>[gMASK]<sop>"}], "max_tokens": 1}
    assert client.post(CHAT, json=body).json["usage"]["prompt_tokens"] == len(asked) >= len(ordinary) + 20


def test_plain_transformers_says_the_same_of_what_is_exported(run, answer, capsys, tmp_path):
    export.main(["--model_save_dir", str(run), "--output_dir", str(tmp_path / "whole"), "--dtype", "float32"])
    printed = capsys.readouterr().out
    assert "llama.cpp:   python chatglm_sft/ft_glm4/export.py" in printed and "vllm" not in printed
    assert not (tmp_path / "whole/Modelfile").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    assert model.generation_config.eos_token_id == answer.stop_ids
    for number, text in enumerate(ASKED):
        messages = [{"role": "user", "content": text}]
        asked = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        ids = tokenizer.apply_chat_template(messages, **asked)
        with torch.no_grad():
            found = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(found) == ANSWERS[number % 2] + "<|user|>"
