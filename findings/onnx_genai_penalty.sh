#!/usr/bin/env bash
# ONNX Runtime GenAI's builder takes temperature, top_k and top_p from generation_config.json, but no repetition penalty
#
# What one would guess: genai_config.json, whose search part has a repetition_penalty, gets the one of the model's
# generation_config.json as it gets its temperature, and the engine's text by its own config is that of transformers by its.
# What happens (onnxruntime-genai 0.18.0, onnxruntime 1.32.0, transformers 5.23.0, 2026-11-29): the builder copies
# temperature, top_k, top_p, do_sample and the ids of special tokens; the penalty is looked for in config.json, where
# transformers 5 never writes it, and is 1.0. Given by hand as a search option it gives transformers' text: 8 of 8.
# Why it matters: some models, Qwen2.5-Instruct among them, are published with a penalty there; what is built of them
# answers without, and nothing is said.
# Set it in genai_config.json, or by set_search_options.
#
# Output seen:
#   onnxruntime-genai 0.18.0, onnxruntime 1.32.0, transformers 5.23.0, torch 2.13.0+cpu
#   guess: {'repetition_penalty': 1.5, 'do_sample': True, 'temperature': 0.7, 'top_k': 20, 'top_p': 0.8} in genai_config.json, 8 of 8 greedy texts equal
#   genai_config.json: {'repetition_penalty': 1.0, 'do_sample': 1, 'temperature': 0.7, 'top_k': 20, 'top_p': 0.8}
#   equal to transformers by its config: as built 0 of 8, with the penalty given 8 of 8
#   as built, equal to transformers without a penalty: 8 of 8
#   as stated: the penalty alone is not copied
set -euo pipefail
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/hf"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
  onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx-ir==1.1.0
cd "$work"
venv/bin/python -W ignore - <<'PY'
import json
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import onnxruntime_genai as genai
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
print(", ".join(f"{name} {version(name)}" for name in ("onnxruntime-genai", "onnxruntime", "transformers", "torch")))
NEW, END = 48, 0
words = {word: number for number, word in enumerate(["<end>", "<unk>", *map(str, range(2, 100))])}
special = dict(pad_token="<end>", eos_token="<end>", unk_token="<unk>")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), **special)
torch.manual_seed(0)
size = dict(
    vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, initializer_range=0.15, max_position_embeddings=128,
)
ids_of = dict(bos_token_id=END, eos_token_id=END, pad_token_id=END)
rope = {"rope_type": "default", "rope_theta": 1e6}
model = Qwen2ForCausalLM(Qwen2Config(**size, **ids_of, rope_parameters=rope)).eval()
sampling = dict(repetition_penalty=1.5, do_sample=True, temperature=0.7, top_k=20, top_p=0.8)
model.generation_config = GenerationConfig(**ids_of, **sampling)
model.save_pretrained("model")
tokenizer.save_pretrained("model")
builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", "model", "-o", "built", "-p", "fp32", "-e", "cpu"]
subprocess.run([*builder, "-c", "cache"], check=True, capture_output=True)
search = json.load(open("built/genai_config.json"))["search"]
net = genai.Model("built")


def its(ids, **options):
    parameters = genai.GeneratorParams(net)
    parameters.set_search_options(max_length=len(ids) + NEW, do_sample=False, **options)
    generator = genai.Generator(net, parameters)
    generator.append_tokens(ids)
    found = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    return found


def transformers(ids, **options):
    return model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, **options)[0, len(ids) :].tolist()


copied = {name: round(search[name], 3) for name in sampling}
print(f"guess: {sampling} in genai_config.json, 8 of 8 greedy texts equal")
print(f"genai_config.json: {copied}")
prompts = [np.random.RandomState(seed).randint(2, 100, 24).tolist() for seed in range(8)]
own = [transformers(ids) for ids in prompts]
left = sum(its(ids) == one for ids, one in zip(prompts, own))
given = sum(its(ids, repetition_penalty=1.5) == one for ids, one in zip(prompts, own))
without = sum(its(ids) == transformers(ids, repetition_penalty=1.0) for ids in prompts)
print(f"equal to transformers by its config: as built {left} of 8, with the penalty given {given} of 8")
print(f"as built, equal to transformers without a penalty: {without} of 8")
if copied != sampling | {"repetition_penalty": 1.0} or left == 8 or (given, without) != (8, 8):
    sys.exit("changed: the builder does otherwise than stated")
print("as stated: the penalty alone is not copied")
PY
