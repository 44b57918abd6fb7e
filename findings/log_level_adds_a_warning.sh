#!/usr/bin/env bash
# Raising the level of the logger transformers.modeling_utils makes from_pretrained say more, not less
#
# What one would guess: a logger set to ERROR shows no warning.
# What happens (transformers 5.23.0, torch 2.13.0, 2026-11-28): from_pretrained looks at this logger's own level and, where
# it is WARNING or more, compares the model's weights with its plan for tensor parallelism. That warns, by another logger,
# of layers that were not sharded, although nothing was asked to be. Left alone the level is 0 and nothing is said.
# Why it matters: who hides the table of missing weights that way gets another, alarming line for a healthy model. A filter
# on the logger, or transformers.logging.set_verbosity_error(), hides both.
#
# Output seen:
#   torch 2.13.0, transformers 5.23.0
#   guess: no line with the logger at ERROR
#   untouched: 0 line(s) of layers that were not sharded
#   raised: 1 line(s) of layers that were not sharded
#   silenced: 0 line(s) of layers that were not sharded
#   as stated: a warning appears only where the level was raised
set -euo pipefail
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/hf"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$work"
cat > load.py <<'PY'
import logging
import sys

import transformers

if sys.argv[1] == "make":
    config = transformers.Qwen2Config(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained("model")
if sys.argv[1] == "raised":
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
if sys.argv[1] == "silenced":
    transformers.logging.set_verbosity_error()
transformers.AutoModelForCausalLM.from_pretrained("model")
PY
venv/bin/python -c 'import torch, transformers; print(f"torch {torch.__version__.split(chr(43))[0]}, transformers {transformers.__version__}")'
echo "guess: no line with the logger at ERROR"
venv/bin/python load.py make > /dev/null 2>&1
for how in untouched raised silenced; do
  count=$(venv/bin/python load.py "$how" 2>&1 | grep -c "were not sharded" || true)
  echo "$how: $count line(s) of layers that were not sharded"
  found="${found:-}$count"
done
if [ "$found" != 010 ]; then
  echo "changed: lines untouched, raised, silenced are $found, not 010"
  exit 1
fi
echo "as stated: a warning appears only where the level was raised"
