#!/usr/bin/env bash
# peft: on Qwen3-MoE the target gate_proj means the experts alone, and a warning says their rank is ignored, which it is not
#
# What one would guess: target_modules gate_proj, up_proj, down_proj adapt the linear layers of these names, as they do in
# a dense model, with the rank that is asked for.
# What happens (peft 0.21.2, transformers 5.23.0, 2026-11-28): the names are turned into the tensors that all experts share.
# The linear layers of these names (of dense layers) get no adapter, with no word. gate_up_proj has twice the rank, by a
# rank_pattern that get_peft_model then reports as not matched and ignored, though it was applied.
# Why it matters: of a model with dense layers beside the experts a part that was asked for is not trained, and the warning
# sends one to look for a rank that is right.
#
# Output seen:
#   torch 2.13.0, transformers 5.23.0, peft 0.21.2
#   linear layers named gate_proj: ['model.layers.0.mlp.gate_proj']
#   guess: gate_proj, up_proj, down_proj adapt these layers, with r 8
#   layers.1.mlp.experts.base_layer.lora_A.default.weight: (64, 32)
#   layers.1.mlp.experts.lora_A.default.weight: (32, 16)
#   warnings of an ignored rank: 1
#   ranks of one expert: [8, 16]
#   as stated: only the experts are adapted, with a doubled rank that the warning says is ignored
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
import warnings

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

transformers.logging.set_verbosity_error()
print(f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, peft {peft.__version__}")
config = Qwen3MoeConfig(
    vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    mlp_only_layers=[0],
)
base = Qwen3MoeForCausalLM(config)
linear = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
dense = [name for name in linear if name.endswith("gate_proj")]
print(f"linear layers named gate_proj: {dense}")
print("guess: gate_proj, up_proj, down_proj adapt these layers, with r 8")
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    net = get_peft_model(base, LoraConfig(r=8, target_modules=["gate_proj", "up_proj", "down_proj"]))
adapted = {name: tuple(p.shape) for name, p in net.named_parameters() if "lora_A" in name}
for name, shape in adapted.items():
    print(f"{name.removeprefix('base_model.model.model.')}: {shape}")
said = [str(one.message) for one in told if "rank_pattern" in str(one.message)]
print(f"warnings of an ignored rank: {len(said)}")
ranks = sorted(shape[0] // 4 for shape in adapted.values())
print(f"ranks of one expert: {ranks}")
if not dense or any("layers.0." in name for name in adapted) or ranks != [8, 16] or not said:
    sys.exit("changed: dense layers, ranks or the warning are no longer as stated")
print("as stated: only the experts are adapted, with a doubled rank that the warning says is ignored")
PY
