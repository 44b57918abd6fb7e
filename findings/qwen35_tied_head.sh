#!/usr/bin/env bash
# transformers: the text model out of a Qwen3.5 folder whose whole config says the head is tied gets a random head
#
# What one would guess: AutoModelForCausalLM on a folder that Qwen3_5ForConditionalGeneration saved has that model's logits.
# What happens (transformers 5.23.0, 2026-11-28): where only the whole config says tie_word_embeddings, the text config that
# is saved beside it says false. The text model then has a head of its own, for which the files have no weight: it is made
# at random, other at each load, and a MISSING row of the load report is the only word.
# Why it matters: fine-tuning or serving the text of a multimodal checkpoint starts from noise in its last layer.
#
# Output seen:
#   torch 2.13.0, transformers 5.23.0
#   guess: AutoModelForCausalLM gives the logits that the saved model has
#   Qwen3_5ForCausalLM: missing ['lm_head.weight'], same logits as saved: False, same when loaded again: False
#   as stated: the head is made at random
set -euo pipefail
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/hf"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
  accelerate==1.15.0
cd "$work"
venv/bin/python -W ignore - <<'PY'
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3_5Config, Qwen3_5ForConditionalGeneration

transformers.logging.set_verbosity_error()
print(f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}")
text = dict(
    vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
    linear_value_head_dim=16,
)
vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32)
config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)
whole = Qwen3_5ForConditionalGeneration(config).eval()
whole.save_pretrained("base")
print("guess: AutoModelForCausalLM gives the logits that the saved model has")
ids = torch.arange(1, 9)[None]
part, told = AutoModelForCausalLM.from_pretrained("base", output_loading_info=True)
again = AutoModelForCausalLM.from_pretrained("base")
with torch.no_grad():
    expected, found, other = (net.eval()(input_ids=ids).logits for net in (whole, part, again))
missing = sorted(told["missing_keys"])
same, twice = torch.allclose(found, expected, atol=1e-4), torch.allclose(found, other)
print(f"{type(part).__name__}: missing {missing}, same logits as saved: {same}, same when loaded again: {twice}")
if missing != ["lm_head.weight"] or same or twice:
    sys.exit("changed: the head is no longer made at random")
print("as stated: the head is made at random")
PY
