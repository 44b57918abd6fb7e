"""Models that a family's recipes take beside its first: trained, scored, asked, exported, each small and random."""

import importlib
import json
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.cli import parse
from common.config import PredictFlags
from common.conversation.turns import Turn
from common.engine.batcher import Batcher
from common.engine.request import Ask
from common.errors import UserError
from common.inference.answerer import Sampling
from common.model import loading
from common.model.loss import supervised
from common.training import packing

ROOT = Path(__file__).resolve().parents[1]
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
QUESTIONS = [[Turn("user", text)] for text in ("1+1", "问" * 40, "有在他" * 5, "3+4")]


class Architecture(NamedTuple):
    """A family's recipes, whose tokenizer to take, and transformers' configuration and model."""

    package: str
    fixture: str
    name: str
    options: dict


ARCHITECTURES = {
    "Gemma 2": Architecture("gemma_sft.ft_gemma", "small_gemma", "Gemma2", {"head_dim": 16, **SLIDING}),
    "Gemma 3, text": Architecture("gemma_sft.ft_gemma", "small_gemma", "Gemma3", {"head_dim": 16, **SLIDING}),
    "Qwen2.5, a head of its own": Architecture(
        "qwen2_sft.ft_qwen2", "small_qwen", "Qwen2", {"tie_word_embeddings": False}
    ),
    "Qwen3": Architecture("qwen2_sft.ft_qwen2", "small_qwen", "Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


@pytest.fixture(scope="module", params=ARCHITECTURES.values(), ids=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def base(architecture, request, tmp_path_factory):
    """A folder with a random model of this architecture and its family's tokenizer."""
    folder = tmp_path_factory.mktemp(architecture.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(request.getfixturevalue(architecture.fixture))
    tokenizer.save_pretrained(folder)
    kind = "Gemma3TextConfig" if architecture.name == "Gemma3" else f"{architecture.name}Config"
    config = getattr(transformers, kind)(vocab_size=len(tokenizer), **SIZES, **architecture.options)
    torch.manual_seed(0)
    getattr(transformers, f"{architecture.name}ForCausalLM")(config).save_pretrained(folder)
    return folder


def recipe(architecture, name):
    return importlib.import_module(f"{architecture.package}.{name}")


@pytest.fixture(scope="module")
def trained(architecture, base, tmp_path_factory):
    """The folder of a short run that learnt, and its command line."""
    parent = tmp_path_factory.mktemp("run")
    rows = [{"query": f"{n}+{n * 7 % 50}", "response": str(n + n * 7 % 50) * (1 + n % 4)} for n in range(60)]
    (parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--path_model_pretrain", base, "--data_path", parent / "rows.jsonl", "--model_save_dir", parent / "out"]
    flags = list(map(str, [*flags, "--cache_dir", parent / "cache", "--learning_rate", 0.01]))
    training = ["--max_steps", "12", "--eval_rows", "2", "--max_new_tokens", "4", "--logging_steps", "1"]
    recipe(architecture, "train").main([*flags, *training])
    return parent / "out", flags


def test_the_loss_is_transformers_own(base):
    net = AutoModelForCausalLM.from_pretrained(base)
    ids = (torch.arange(2 * 24).view(2, 24) * 7) % 90 + 5
    labels = ids.clone()
    labels[:, :8] = -100
    expected = net(input_ids=ids, labels=labels).loss
    with supervised(net):
        torch.testing.assert_close(net(input_ids=ids, labels=labels).loss, expected)


def test_packed_rows_are_apart(base):
    rows = [[{"input_ids": list(range(5, end)), "labels": list(range(5, end)), "where": "f"} for end in (25, 12, 30)]]
    packs = types.SimpleNamespace(packs=rows, __getitems__=lambda numbers: [rows[number] for number in numbers])
    packing.check_apart(loading.load_base(base, "float32"), packs, torch.float32)


def test_it_learns_and_its_adapter_holds_every_layer(architecture, trained):
    folder, _ = trained
    log = [json.loads(line)["loss"] for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    assert log[-1] < log[0]
    assert len(load_file(folder / "adapter_model.safetensors")) == 2 * 3 * 2, "layers × targets × (A, B)"


def test_answers_do_not_depend_on_the_batch(architecture, trained):
    cfg = parse(recipe(architecture, "config").Config, PredictFlags, trained[1])[0]
    answer = recipe(architecture, "predict").load_answer(cfg)
    greedy = Sampling(max_new_tokens=12)
    alone = [answer([turns], greedy)[0] for turns in QUESTIONS]
    assert answer(QUESTIONS, greedy) == alone
    batcher = Batcher(answer, {"tuned": "default"})
    tickets = [batcher.submit("tuned", [Ask(batcher.encoder.whole_ids(turns), greedy)]) for turns in QUESTIONS]
    assert ["".join(part.text for parts in ticket.parts() for part in parts) for ticket in tickets] == [
        answer.text for answer in alone
    ]
    batcher.close()


def test_it_is_exported_with_its_self_test(architecture, trained, tmp_path):
    folder, flags = trained
    recipe(architecture, "export").main(["--model_save_dir", str(folder), "--output_dir", str(tmp_path / "merged")])
    assert (tmp_path / "merged" / "model.safetensors").exists()


# ---------------------------------------------------------------- models that are refused in one line


@pytest.fixture
def quantised(small_qwen, tmp_path):
    """quantised(config): a folder whose model says it is stored so."""

    def write(stored):
        config = transformers.AutoConfig.from_pretrained(small_qwen)
        config.quantization_config = stored
        config.save_pretrained(tmp_path)
        return tmp_path

    return write


@pytest.mark.parametrize("own, bits", [(4, 0), (4, 8), (8, 0), (8, 4)])
def test_a_quantised_model_is_taken_as_it_is_stored_or_not_at_all(quantised, own, bits):
    folder = quantised({"quant_method": "bitsandbytes", "load_in_4bit": own == 4, "load_in_8bit": own == 8})
    with pytest.raises(UserError, match=f"--tuning qlora --quantization_bit {own}"):
        loading.load_base(folder, "float32", bits)


def test_what_a_quantised_model_needs_is_named(quantised):
    folder = quantised({"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(UserError, match="pip install"):
        loading.load_base(folder, "float32")


def test_a_model_stored_in_4_bits_loads_as_it_was(tmp_path):
    base = loading.load_base(ROOT / "qwen2_sft/embedded", "float32", 4)
    base.save_pretrained(tmp_path)
    again = loading.load_base(tmp_path, "float32", 4)
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, base(input_ids=ids).logits)
