#!/usr/bin/env bash
# Full fine-tuning with Trainer(bf16=True) moves few weights and no norm, because from_pretrained now loads bf16
#
# What one would guess: bf16=True is mixed precision: weights stay in float32, each step with a gradient changes them.
# What happens (transformers 5.23.0, torch 2.13.0, 2026-11-28): since transformers 5 from_pretrained takes the dtype of
# the checkpoint, bf16 for nearly all; Trainer keeps no float32 copy. A step of AdamW is about the learning rate, 1e-5;
# around 1.0 bf16 has steps of 0.0039 to 0.0078, so the update is rounded away. After 40 steps no norm weight has changed
# at all, most others neither, and the loss has fallen a tenth as far as with dtype=torch.float32 in from_pretrained,
# where nearly all weights change.
# Why it matters: the loss falls a little, so the run looks well, and the model has learned a part of what it could. (peft
# makes adapters in float32, so LoRA is not hit.)
#
# Output seen:
#   torch 2.13.0, transformers 5.23.0
#   guess: with bf16=True nearly every weight has changed after 40 steps
#   loss before: 4.6223
#   from_pretrained(folder): torch.bfloat16, changed 15% of all weights, 0% of the norms, loss after 4.6211
#   dtype=torch.float32: torch.float32, changed 100% of all weights, 100% of the norms, loss after 4.6101
#   as stated: the norms stand still and most of the other weights too
set -euo pipefail
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/hf"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$work"
venv/bin/python - <<'PY'
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
print(f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}")
torch.manual_seed(0)
config = Qwen2Config(
    vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)
Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained("checkpoint")
rows = [torch.randint(2, 100, (16,)).tolist() for _ in range(64)]
data = [{"input_ids": row, "labels": row, "attention_mask": [1] * 16} for row in rows]


def train(**kwargs):
    model = AutoModelForCausalLM.from_pretrained("checkpoint", **kwargs)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    arguments = TrainingArguments(
        "out", learning_rate=1e-5, lr_scheduler_type="constant", per_device_train_batch_size=8, num_train_epochs=5,
        bf16=True, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    moved = lambda names: sum((model.get_parameter(n) != before[n]).sum().item() for n in names) / sum(
        before[n].numel() for n in names
    )
    norms = [name for name in before if "norm" in name]
    ids = torch.tensor(rows)
    with torch.no_grad():
        loss = model.float()(ids, labels=ids).loss.item()
    return before[norms[0]].dtype, moved(list(before)), moved(norms), loss


print("guess: with bf16=True nearly every weight has changed after 40 steps")
ids = torch.tensor(rows)
with torch.no_grad():
    start = AutoModelForCausalLM.from_pretrained("checkpoint", dtype=torch.float32)(ids, labels=ids).loss.item()
print(f"loss before: {start:.4f}")
seen = {}
for name, kwargs in {"from_pretrained(folder)": {}, "dtype=torch.float32": {"dtype": torch.float32}}.items():
    dtype, weights, norms, loss = seen[name] = train(**kwargs)
    print(f"{name}: {dtype}, changed {weights:.0%} of all weights, {norms:.0%} of the norms, loss after {loss:.4f}")
low, full = seen.values()
held = low[0] == torch.bfloat16 and low[1] < 0.5 and low[2] == 0 and full[1] > 0.9 and full[2] > 0.9
if not held or low[3] - full[3] < 0.1 * (start - full[3]):
    sys.exit("changed: training in bf16 moves other weights than stated")
print("as stated: the norms stand still and most of the other weights too")
PY
