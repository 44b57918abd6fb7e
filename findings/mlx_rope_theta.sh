#!/usr/bin/env bash
# mlx-lm reads a Qwen2 or Llama folder saved by transformers 5 with the wrong rotary base
#
# What one would guess: a model saved by save_pretrained gives the same greedy text in mlx-lm, or mlx-lm refuses it.
# What happens (transformers 5.23.0, mlx-lm 0.32.2, mlx 0.32.4, 2026-11-28): transformers 5 writes the rotary base only
# as rope_parameters.rope_theta; mlx-lm's qwen2 and llama look for rope_theta at the top of config.json, do not find it and
# take 1,000,000 and 10,000. Every text differs, nothing is said. qwen3 reads both places and is right. With rope_theta
# put at the top of config.json all are equal.
# Why it matters: DeepSeek-R1-Distill-Qwen-7B and Qwen2.5-Math-7B (base 10,000) or Llama 3 (500,000), fine-tuned, merged
# and saved today, write other text there. Other Qwen2.5 have 1,000,000 and are right by luck. Add the key.
#
# Output seen:
#   torch 2.13.0+cpu, transformers 5.23.0, mlx-lm 0.32.2, mlx 0.32.4
#   guess: 8 of 8 greedy texts are equal, for every base
#   qwen2, base 10,000: rope_theta at the top False, equal as saved 0 of 8, with rope_theta added 8 of 8
#   qwen2, base 1,000,000: rope_theta at the top False, equal as saved 8 of 8, with rope_theta added 8 of 8
#   llama, base 500,000: rope_theta at the top False, equal as saved 0 of 8, with rope_theta added 8 of 8
#   qwen3, base 10,000: rope_theta at the top False, equal as saved 8 of 8, with rope_theta added 8 of 8
#   as stated: mlx-lm takes its own default where transformers 5 wrote another base
set -euo pipefail
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/hf"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 transformers==5.23.0 mlx-lm==0.32.2 'mlx[cpu]==0.32.4'
cd "$work"
venv/bin/python - <<'PY'
import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
mx.set_default_device(mx.cpu)
print(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "mlx-lm", "mlx")))
size = dict(
    vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, initializer_range=0.15, max_position_embeddings=512,
)


def greedy(logits, ids, steps=32):
    ids = list(ids)
    for _ in range(steps):
        ids.append(int(np.argmax(logits(ids)[-1])))
    return ids


def compare(torch_model, folder):
    mlx_model, _ = load_model(folder)
    one = lambda ids: torch_model(torch.tensor([ids])).logits[0].numpy()
    two = lambda ids: np.array(mlx_model(mx.array([ids])).astype(mx.float32))[0]
    prompts = [np.random.RandomState(seed).randint(2, 300, 24).tolist() for seed in range(8)]
    return sum(greedy(one, ids) == greedy(two, ids) for ids in prompts)


print("guess: 8 of 8 greedy texts are equal, for every base")
seen = []
with torch.no_grad():
    for name, config, model, base in (
        ("qwen2", Qwen2Config, Qwen2ForCausalLM, 10_000.0),
        ("qwen2", Qwen2Config, Qwen2ForCausalLM, 1_000_000.0),
        ("llama", LlamaConfig, LlamaForCausalLM, 500_000.0),
        ("qwen3", Qwen3Config, Qwen3ForCausalLM, 10_000.0),
    ):
        torch.manual_seed(0)
        made = model(config(**size, rope_parameters={"rope_type": "default", "rope_theta": base})).eval()
        folder = Path(f"{name}_{base:g}")
        made.save_pretrained(folder)
        keys = json.loads((folder / "config.json").read_text())
        saved = compare(made, folder)
        (folder / "config.json").write_text(json.dumps({**keys, "rope_theta": base}))
        added = compare(made, folder)
        print(
            f"{name}, base {base:,.0f}: rope_theta at the top {'rope_theta' in keys}, equal as saved {saved} of 8, "
            f"with rope_theta added {added} of 8"
        )
        seen.append((saved, added))
if seen != [(0, 8), (8, 8), (0, 8), (8, 8)]:
    sys.exit("changed: mlx-lm and transformers agree otherwise than stated")
print("as stated: mlx-lm takes its own default where transformers 5 wrote another base")
PY
