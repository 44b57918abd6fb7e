"""The embedded base: what is shipped is what data/ gives, and plain transformers loads it."""

import json

import pytest
import torch

from chatglm_sft import make_embedded as chatglm
from chatglm_sft import prompt as chatglm_prompt
from common.conversation.render import encode_text
from common.training import pretrain
from gemma_sft import make_embedded as gemma
from gemma_sft import prompt as gemma_prompt
from qwen2_sft import make_embedded as qwen
from qwen2_sft import prompt as qwen_prompt

MAKERS = {"gemma": (gemma, gemma_prompt), "qwen": (qwen, qwen_prompt), "chatglm": (chatglm, chatglm_prompt)}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS, scope="module")
def maker(request):
    return request.param


@pytest.fixture(scope="module")
def folder(maker):
    return maker[0].Config.EMBEDDED_DIR


def test_it_was_made_from_todays_data(folder, maker):
    record = json.loads((folder / "inputs.json").read_text())
    phases = getattr(maker[0], "PHASES", pretrain.PHASES)
    assert record["inputs_sha256"] == pretrain.inputs_hash(phases), "data/ has changed: run make_embedded.py again"


def test_it_is_small(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3 * 2**20


def test_plain_transformers_loads_it(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert 1_000_000 < model.num_parameters() < 3_000_000
    pieces = [tokenizer.decode([id_]) for id_ in encode_text(tokenizer, "黑色连衣裙")]
    assert [piece for piece in pieces if piece] == list("黑色连衣裙")
    ids = tokenizer("黑色连衣裙", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()


def test_its_tokenizer_loses_nothing(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "类型#裙*颜色#黑色\nabc 123 😀 龘 <end_of_turn> <|im_end|> <sop>"
    assert tokenizer.decode(encode_text(tokenizer, text)) == text


@pytest.mark.slow
def test_building_is_deterministic(maker, tmp_path):
    script, prompt = maker
    phases = (pretrain.Phase(32, 0.45, 0.1, 1e-3), pretrain.Phase(32, 0.8, 0.1, 1e-3))
    turns_of = getattr(script, "turns_of", pretrain.as_text)
    for name in ("one", "two"):
        pretrain.build(script.make_tokenizer, script.make_model, prompt, tmp_path / name, phases, turns_of)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
