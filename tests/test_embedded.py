"""The embedded base: what is shipped is what data/ gives, and plain transformers loads it."""

import json

import pytest
import torch

from common import embedded
from common.pieces import encode_text
from gemma_sft.ft_gemma.config import Config
from gemma_sft.make_embedded import make_model, make_tokenizer

FOLDERS = {"gemma": Config.EMBEDDED_DIR}


@pytest.fixture(params=FOLDERS.values(), ids=FOLDERS, scope="module")
def folder(request):
    return request.param


def test_it_was_made_from_todays_data(folder):
    record = json.loads((folder / "inputs.json").read_text())
    assert record["inputs_sha256"] == embedded.inputs_hash(), "data/ has changed: run make_embedded.py again"


def test_it_is_small(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3_000_000


def test_plain_transformers_loads_it(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert 1_000_000 < model.num_parameters() < 3_000_000
    ids = tokenizer("黑色连衣裙", return_tensors="pt").input_ids
    assert len(set(ids[0].tolist()) - {tokenizer.bos_token_id}) == 5 and tokenizer.unk_token_id not in ids
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()


def test_its_tokenizer_loses_nothing(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "类型#裙*颜色#黑色\nabc 123 😀 龘 <end_of_turn>"
    assert tokenizer.decode(encode_text(tokenizer, text)) == text


@pytest.mark.slow
def test_building_is_deterministic(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "PHASES", [(32, 0.45, 1e-3), (32, 0.8, 1e-3)])
    for name in ("one", "two"):
        embedded.build(make_tokenizer, make_model, tmp_path / name)
    for file in ("model.safetensors", "tokenizer.json", "inputs.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
