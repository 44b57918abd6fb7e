#!/usr/bin/env bash
# peft: an adapter without trained token rows cannot be loaded after one that has them
#
# What one would guess: several LoRA adapters over one base load in any order.
# What happens (peft 0.21.2, transformers 5.23.0, 2026-11-28): where the first one was saved with trainable_token_indices,
# load_adapter of one without them raises a KeyError that names a tensor of neither file's user. The other way round works.
# Why it matters: a server that holds a chat adapter (with rows for new control tokens) and a plain one starts or fails by
# the order of its arguments, and the message sends one to look for a damaged file.
#
# Output seen:
#   torch 2.13.0, transformers 5.23.0, peft 0.21.2
#   guess: both orders load
#   plain, then rows: loaded
#   rows, then plain: KeyError 'base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta'
#   as stated: the order decides
set -euo pipefail
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/hf"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
  accelerate==1.15.0 peft==0.21.2
cd "$work"
venv/bin/python -W ignore - <<'PY'
import sys

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

transformers.logging.set_verbosity_error()
print(f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, peft {peft.__version__}")
config = Qwen2Config(
    vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, tie_word_embeddings=True,
)
for name, more in {"plain": {}, "rows": {"trainable_token_indices": [5]}}.items():
    lora = LoraConfig(r=4, target_modules=["q_proj"], **more)
    get_peft_model(Qwen2ForCausalLM(config), lora).save_pretrained(name)
print("guess: both orders load")
found = {}
for first, second in (("plain", "rows"), ("rows", "plain")):
    net = PeftModel.from_pretrained(Qwen2ForCausalLM(config), first, adapter_name="first")
    try:
        net.load_adapter(second, adapter_name="second")
        found[first] = "loaded"
    except KeyError as error:
        found[first] = f"KeyError {error}"
    print(f"{first}, then {second}: {found[first]}")
if found["plain"] != "loaded" or not found["rows"].startswith("KeyError"):
    sys.exit("changed: the order no longer decides as stated")
print("as stated: the order decides")
PY
