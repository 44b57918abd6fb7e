#!/usr/bin/env bash
# CTranslate2: whether the repetition penalty counts the prompt hangs on whether the result is to include it
#
# What one would guess: include_prompt_in_result=False leaves the prompt out of what is returned, and changes no id of the
# answer; with repetition_penalty the answer is that of transformers, where the ids of the prompt are counted too.
# What happens (ctranslate2 4.8.5, transformers 5.23.0, torch 2.13.0, 2026-11-29): with True the penalty counts the
# prompt, but for its first id (taken for a start token), and the answer; else the text is transformers'. With False it counts
# the answer alone. Without a penalty both are equal. Nothing is said.
# Why it matters: False is what one asks for, and the faster way. Some models, Qwen2.5-Instruct among them, are
# published with a penalty: one gives it to CTranslate2 by hand, and gets other text than from transformers or vLLM.
#
# Output seen:
#   ctranslate2 4.8.5, transformers 5.23.0, torch 2.13.0+cpu
#   guess: 8 of 8 equal to transformers with the prompt, whether it is included in the result or not
#   penalty 1.0, include_prompt_in_result=True: equal to transformers 8 of 8, to a penalty of the answer alone 8 of 8
#   penalty 1.0, include_prompt_in_result=False: equal to transformers 8 of 8, to a penalty of the answer alone 8 of 8
#   penalty 1.5, include_prompt_in_result=True: equal to transformers 8 of 8, to a penalty of the answer alone 1 of 8
#   penalty 1.5, include_prompt_in_result=False: equal to transformers 1 of 8, to a penalty of the answer alone 8 of 8
#   as stated: the prompt is counted only where it is returned
set -euo pipefail
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/hf"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 transformers==5.23.0 ctranslate2==4.8.5
cd "$work"
venv/bin/python -W ignore - <<'PY'
import json
import sys
from importlib.metadata import version

import ctranslate2
import numpy as np
import torch
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
print(", ".join(f"{name} {version(name)}" for name in ("ctranslate2", "transformers", "torch")))
NEW, END = 48, 0
words = {word: number for number, word in enumerate(["<end>", "<unk>", *map(str, range(2, 100))])}
special = dict(pad_token="<end>", eos_token="<end>", unk_token="<unk>")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), **special)
torch.manual_seed(0)
size = dict(
    vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, initializer_range=0.15, bos_token_id=END, eos_token_id=END, pad_token_id=END,
)
model = Qwen2ForCausalLM(Qwen2Config(**size, rope_parameters={"rope_type": "default", "rope_theta": 1e6})).eval()
model.save_pretrained("model")
tokenizer.save_pretrained("model")
config = json.load(open("model/config.json"))
json.dump(config | {"rope_theta": 1e6}, open("model/config.json", "w"))  # where the converter looks for it
made = TransformersConverter("model").convert("converted", quantization="float32")
generator = ctranslate2.Generator(made, compute_type="float32")
pieces = json.load(open("converted/vocabulary.json"))


def transformers(ids, penalty, prompt):
    """Greedy ids under a penalty that counts the answer's ids, and with `prompt` the prompt's behind its first too."""
    new = []
    while len(new) < NEW and END not in new:
        logits = model(torch.tensor([ids + new])).logits[0, -1]
        seen = torch.tensor(sorted({*(ids[1:] if prompt else []), *new}), dtype=torch.long)
        logits[seen] = torch.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
        new.append(int(logits.argmax()))
    return new


def its(ids, penalty, included):
    options = dict(include_prompt_in_result=included, end_token=[END], return_end_token=True, sampling_topk=1)
    options |= dict(repetition_penalty=penalty, max_length=NEW + included * len(ids))
    found = generator.generate_batch([[pieces[number] for number in ids]], **options)[0].sequences_ids[0]
    return found[included * len(ids) :][:NEW]


print("guess: 8 of 8 equal to transformers with the prompt, whether it is included in the result or not")
seen = []
with torch.no_grad():
    prompts = [np.random.RandomState(seed).randint(2, 100, 24).tolist() for seed in range(8)]
    own = model.generate(torch.tensor(prompts[1:2]), max_new_tokens=NEW, do_sample=False, repetition_penalty=1.5)
    assert transformers(prompts[1], 1.5, True) == own[0, 24:].tolist()  # an answer without the prompt's first id
    for penalty in (1.0, 1.5):
        for included in (True, False):
            found = [its(ids, penalty, included) for ids in prompts]
            equal = [sum(one == transformers(ids, penalty, which) for one, ids in zip(found, prompts)) for which in (True, False)]
            print(f"penalty {penalty}, include_prompt_in_result={included}: equal to transformers {equal[0]} of 8, to a penalty "
                  f"of the answer alone {equal[1]} of 8")
            seen.append(equal)
if seen[:2] != [[8, 8], [8, 8]] or seen[2][0] != 8 or seen[2][1] == 8 or seen[3][1] != 8 or seen[3][0] == 8:
    sys.exit("changed: the penalty counts otherwise than stated")
print("as stated: the prompt is counted only where it is returned")
PY
