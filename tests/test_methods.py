"""Every tuning method on the embedded base: the loss falls, plain peft and transformers reload it, it is exported."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common import report
from common.config import TrainFlags, parse

FAMILIES = ["gemma_sft.ft_gemma"]  # a family more is one entry more
METHODS = {
    "lora": [],
    "qlora 4 bit": ["--tuning", "qlora"],
    "qlora 8 bit": ["--tuning", "qlora", "--quantization_bit", 8],
    "dora": ["--use_dora"],
    "rslora": ["--use_rslora"],
    "pissa": ["--use_pissa"],
    "embeddings, head and norms": [
        *["--target_modules", "all-linear,all-embedding,lm_head"],
        *["--modules_to_save", "all-norm"],
    ],
    "full": ["--tuning", "full"],
    "freeze": ["--tuning", "freeze", "--freeze_trainable_layers", 1],
}
CASES = [(family, method) for family in FAMILIES for method in METHODS]
DATA = Path(__file__).resolve().parents[1] / "data"
PLAIN = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
if len(sys.argv) > 2: __import__(sys.argv[2])  # a model class of its own registers itself
four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
for base, folder, bits, ids in json.loads(sys.argv[1]):
    quantised = {4: four, 8: dict(load_in_8bit=True)}.get(bits)
    options = dict(quantization_config=BitsAndBytesConfig(**quantised)) if bits else {}
    model = AutoModelForCausalLM.from_pretrained(base or folder, dtype=torch.float32, **options)
    model = (PeftModel.from_pretrained(model, folder) if base else model).eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.tensor([ids])).logits, folder + "/plain.pt")
"""


def recipe(family, name):
    return importlib.import_module(f"{family}.{name}")


def train(family, folder, *more):
    """A short run of the family's train.py on its embedded base; each step's loss."""
    flags = ["--data_path", f"{DATA / 'product_train.jsonl'}#64", "--model_save_dir", folder, "--max_steps", 12]
    flags += ["--eval_data_path", DATA / "product_heldout.jsonl", "--eval_rows", 0, "--val_set_size", 0]
    flags += ["--micro_batch_size", 4, "--batch_size", 4, "--logging_steps", 3]
    flags += ["--cache_dir", folder.parent / "cache", *more]
    recipe(family, "train").main(list(map(str, flags)))
    return [json.loads(line)["loss"] for line in (folder / "trainer_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{(family, method): (folder, losses, the trained model's logits, ids)}, each also reloaded by plain libraries."""
    parent, made, kept = tmp_path_factory.mktemp("runs"), {}, {}
    leave = report.leave

    def spy(work, net, tokenizer, results):
        ids = tokenizer.encode("类型#裙*颜色#黑色", add_special_tokens=False)
        with torch.no_grad():
            kept[str(work.folder)] = (net.eval()(input_ids=torch.tensor([ids])).logits, ids)
        return leave(work, net, tokenizer, results)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "leave", spy)
        for number, (family, method) in enumerate(CASES):
            folder = parent / str(number)
            losses = train(family, folder, *METHODS[method])
            made[family, method] = (folder, losses, *kept[str(folder)])
    for family in FAMILIES:
        jobs = [job(made[family, method]) for method in METHODS]
        subprocess.run([sys.executable, "-c", PLAIN, json.dumps(jobs)], check=True)
    return made


def job(run):
    folder, _, _, ids = run
    config = json.loads((folder / "run_manifest.json").read_text())["config"]
    adapter = folder / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else ""
    return base, str(folder), config["quantization_bit"] * (config["tuning"] == "qlora"), ids


def answerer(family, folder, *more):
    Config = recipe(family, "config").Config
    cfg, _ = parse(Config, TrainFlags, ["--model_save_dir", str(folder), *map(str, more)])
    return recipe(family, "predict").load_answer(cfg)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), CASES)
def test_it_learns_and_is_reloaded_alike(runs, family, method):
    folder, losses, trained, ids = runs[family, method]
    assert losses[-1] < 0.9 * losses[0], losses
    plain = torch.load(folder / "plain.pt", weights_only=True)
    answer = answerer(family, folder)
    with torch.no_grad():
        ours = answer.net(input_ids=torch.tensor([ids])).logits
    scale = trained.abs().max()
    assert (plain - ours).abs().max() <= 1e-6 * scale
    assert (ours - trained).abs().max() <= 1e-5 * scale, "what is loaded must be what was trained"


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), CASES)
def test_it_is_exported_with_its_self_test(runs, tmp_path, capsys, family, method):
    folder = runs[family, method][0]
    recipe(family, "export").main(
        ["--model_save_dir", str(folder), "--output_dir", str(tmp_path / "whole"), "--dtype", "float32"]
    )
    printed = capsys.readouterr().out
    assert printed.count("greedy answers equal 8/8") == 2 and "done: 完整模型" in printed
    config = json.loads((tmp_path / "whole/config.json").read_text())
    untied = method == "embeddings, head and norms"
    assert config["tie_word_embeddings"] is not untied and "quantization_config" not in config
    assert ("lm_head.weight" in load_file(tmp_path / "whole/model.safetensors")) == untied
