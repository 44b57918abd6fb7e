#!/usr/bin/env bash
# ONNX Runtime GenAI 0.18 lists Gemma 3, and its builder can build it beside no transformers: neither 4.57 nor 5.23
#
# What one would guess: a release whose builder has a class for Gemma3ForCausalLM builds a Gemma 3, at least with one of the
# releases of transformers it can be installed with.
# What happens (onnxruntime-genai 0.18.0, onnxruntime 1.32.0, torch 2.13.0, 2026-11-29): beside transformers 5.23.0 the
# builder reads config.rope_parameters["rope_type"]; Gemma 3's rope_parameters has a part for each type of layer since
# transformers 5, whatever config.json has (rope_theta and rope_local_base_freq become these parts too): KeyError. Beside
# transformers 4.57.6 the builder does not start: it imports a class that came with transformers 5. Qwen2 builds beside 5.23.
# Why it matters: nothing is wrong with the folder, and no older or newer transformers is the way out; Gemma 3 needs an
# older onnxruntime-genai, or another engine.
#
# Output seen:
#   onnxruntime-genai 0.18.0, onnxruntime 1.32.0, torch 2.13.0+cpu
#   guess: built beside one of the two
#   transformers 5.23.0: Qwen2 built; Gemma 3 KeyError: 'rope_type'; Gemma 3 with the keys of before KeyError: 'rope_type'
#   transformers 4.57.6: Gemma 3 with the keys of before ImportError: cannot import name 'Qwen3_5ForConditionalGeneration'
#   as stated: beside neither
set -euo pipefail
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/hf"
cd "$work"
packages=(torch==2.13.0 onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx-ir==1.1.0)
for version in 5.23.0 4.57.6; do
  python3 -m venv "$version"
  "$version/bin/pip" install -qq --disable-pip-version-check "${packages[@]}" "transformers==$version"
done
cat > models.py <<'PY'
import json
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM,
)
from transformers.utils import logging

logging.disable_progress_bar()
print(", ".join(f"{name} {version(name)}" for name in ("onnxruntime-genai", "onnxruntime", "torch")))
size = dict(
    vocab_size=100, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
    pad_token_id=0, eos_token_id=1, bos_token_id=2, max_position_embeddings=128,
)
torch.manual_seed(0)
gemma = Gemma3TextConfig(**size, num_hidden_layers=6, head_dim=16, sliding_window=16)
words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *map(str, range(4, 100))])}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
    pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
)
models = {"gemma": Gemma3ForCausalLM(gemma), "qwen": Qwen2ForCausalLM(Qwen2Config(**size, num_hidden_layers=2))}
for name, model in models.items():
    model.save_pretrained(name)
    tokenizer.save_pretrained(name)
shutil.copytree("gemma", "gemma_before")
config = json.loads(Path("gemma/config.json").read_text())
del config["rope_parameters"]
config |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None}
Path("gemma_before/config.json").write_text(json.dumps(config))
PY
5.23.0/bin/python -W ignore models.py
build() { # transformers' version, folder: built, or the error
  if "$1/bin/python" -W ignore -m onnxruntime_genai.models.builder -i "$2" -o "$1.$2" -p fp32 -e cpu -c cache > log 2>&1; then
    echo built
  else
    tail -1 log | sed 's/ from .*//'
  fi
}
echo "guess: built beside one of the two"
qwen=$(build 5.23.0 qwen) now=$(build 5.23.0 gemma) before=$(build 5.23.0 gemma_before) old=$(build 4.57.6 gemma_before)
echo "transformers 5.23.0: Qwen2 $qwen; Gemma 3 $now; Gemma 3 with the keys of before $before"
echo "transformers 4.57.6: Gemma 3 with the keys of before $old"
if [[ "$qwen" != built || "$now$before" != "KeyError: 'rope_type'KeyError: 'rope_type'" || "$old" != ImportError* ]]; then
  echo "changed: the builder does otherwise than stated"
  exit 1
fi
echo "as stated: beside neither"
