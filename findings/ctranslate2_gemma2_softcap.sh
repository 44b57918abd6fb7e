#!/usr/bin/env bash
# CTranslate2 converts Gemma 2 without its soft caps, its window and its own scale of attention, and says nothing
#
# What one would guess: a model class that TransformersConverter has a loader for (Gemma2Config) computes what transformers
# computes, or the converter refuses what it cannot express.
# What happens (ctranslate2 4.8.5, transformers 5.23.0, torch 2.13.0, 2026-11-28): attn_logit_softcapping,
# final_logit_softcapping, sliding_window and query_pre_attn_scalar of the config are not read. The converted model's logits
# are those of the same weights under a config without them, to float32's rounding, and far from the model's own.
# Why it matters: Gemma 2 was trained with both caps, a window of 4,096 and, at 27B, a scale of its own. Loss and text look
# plausible, so a comparison of tokens per second is made with another model. Gemma 1 and 3 have no caps and are equal.
#
# Output seen:
#   ctranslate2 4.8.5, transformers 5.23.0, torch 2.13.0+cpu
#   guess: largest difference of logits below 0.001
#   Gemma 2 as saved, against CTranslate2: 14.89
#   its weights without caps, window and scale, against CTranslate2: 0.0000
#   as stated: CTranslate2 computes Gemma 2 without them
set -euo pipefail
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/hf"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 transformers==5.23.0 ctranslate2==4.8.5
cd "$work"
venv/bin/python -W ignore - <<'PY'
import sys
from importlib.metadata import version

import ctranslate2
import numpy as np
import torch
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
print(", ".join(f"{name} {version(name)}" for name in ("ctranslate2", "transformers", "torch")))
size = dict(
    vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, initializer_range=0.3, pad_token_id=0, eos_token_id=1, bos_token_id=2,
)
own = dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0, sliding_window=8, query_pre_attn_scalar=64)
without = dict(
    attn_logit_softcapping=None, final_logit_softcapping=None, sliding_window=4096, query_pre_attn_scalar=size["head_dim"]
)
torch.manual_seed(0)
model = Gemma2ForCausalLM(Gemma2Config(**size, **own, attn_implementation="eager")).eval()
plain = Gemma2ForCausalLM(Gemma2Config(**size, **without, attn_implementation="eager")).eval()
plain.load_state_dict(model.state_dict())
model.save_pretrained("model")
words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *map(str, range(4, 100))])}
PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
    pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
).save_pretrained("model")
TransformersConverter("model").convert("converted", quantization="float32")
generator = ctranslate2.Generator("converted", device="cpu", compute_type="float32")
ids = [2, *np.random.RandomState(0).randint(4, 100, 24).tolist()]
theirs = np.array(generator.forward_batch(ctranslate2.StorageView.from_array(np.array([ids], dtype=np.int32)),
                                          ctranslate2.StorageView.from_array(np.array([len(ids)], dtype=np.int32))))[0]
with torch.no_grad():
    found = [float(np.abs(net(torch.tensor([ids])).logits[0].numpy() - theirs).max()) for net in (model, plain)]
print("guess: largest difference of logits below 0.001")
print(f"Gemma 2 as saved, against CTranslate2: {found[0]:.2f}")
print(f"its weights without caps, window and scale, against CTranslate2: {found[1]:.4f}")
if not (found[0] > 0.1 and found[1] < 0.001):
    sys.exit("changed: CTranslate2 and transformers agree otherwise than stated")
print("as stated: CTranslate2 computes Gemma 2 without them")
PY
