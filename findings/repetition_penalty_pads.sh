#!/usr/bin/env bash
# transformers up to 5.22: in a padded batch the repetition penalty counts the pads, and rows do not stop
#
# What one would guess: a padded row of a greedy batch with an attention mask gets the answer that it gets alone.
# What happens (transformers 5.22.2, 2026-11-29): with repetition_penalty the pads on the left count as ids that were there.
# Where the pad is the end token, as many tokenizers without a pad are used, every padded row has its end made less likely.
# From 5.23.0 on the mask is looked at, and both are equal.
# Why it matters: an evaluation in batches, on a transformers of some months ago, shows a model that repeats itself or never
# stops where it does neither, and its scores depend on the batch size.
#
# Output seen:
#   torch 2.13.0, 32 prompts of 2 to 33 ids, greedy, at most 20 new ids
#   guess: alone and in a batch the answers are equal
#   transformers 5.22.2, penalty 1.0: 0 of 32 differ, 1 stopped alone, 1 in a batch
#   transformers 5.22.2, penalty 1.3: 12 of 32 differ, 15 stopped alone, 3 in a batch
#   transformers 5.23.0, penalty 1.0: 0 of 32 differ, 1 stopped alone, 1 in a batch
#   transformers 5.23.0, penalty 1.3: 0 of 32 differ, 15 stopped alone, 15 in a batch
#   as stated: up to 5.22.2 the pads count
set -euo pipefail
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/hf"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 transformers==5.23.0
"$work/venv/bin/pip" install -qq --disable-pip-version-check --no-deps --target "$work/older" transformers==5.22.2
cd "$work"
cat > count.py <<'PY'
import torch
import transformers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

transformers.logging.set_verbosity_error()
END, NEW = 0, 20
torch.manual_seed(0)
config = Qwen2Config(
    vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
)
net = Qwen2ForCausalLM(config).eval()
prompts = [torch.randint(1, 40, (length,)).tolist() for length in range(2, 34)]


def answers(rows, penalty):
    width = max(map(len, rows))
    ids = torch.tensor([[END] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    settings = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, repetition_penalty=penalty, pad_token_id=END, eos_token_id=END
    )
    found = net.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, width:].tolist()
    return [row[: row.index(END)] if END in row else row for row in found]


for penalty in (1.0, 1.3):
    alone = [answers([row], penalty)[0] for row in prompts]
    batch = answers(prompts, penalty)
    stopped = [sum(len(row) < NEW for row in rows) for rows in (alone, batch)]
    differ = sum(one != other for one, other in zip(alone, batch))
    print(
        f"transformers {transformers.__version__}, penalty {penalty}: {differ} of {len(prompts)} differ, "
        f"{stopped[0]} stopped alone, {stopped[1]} in a batch"
    )
PY
venv/bin/python -c 'import torch; print("torch", torch.__version__.split("+")[0], end=", ")'
echo "32 prompts of 2 to 33 ids, greedy, at most 20 new ids"
echo "guess: alone and in a batch the answers are equal"
PYTHONPATH="$work/older" venv/bin/python -W ignore count.py | tee found
venv/bin/python -W ignore count.py | tee -a found
equal() { grep -q "transformers $1, penalty $2: 0 of" found; }
if equal 5.22.2 1.0 && ! equal 5.22.2 1.3 && equal 5.23.0 1.0 && equal 5.23.0 1.3; then
  echo "as stated: up to 5.22.2 the pads count"
else
  echo "changed: the pads no longer count as stated" >&2
  exit 1
fi
