#!/usr/bin/env bash
# Trainer's eval_loss depends on per_device_eval_batch_size, and may call another checkpoint the best
#
# What one would guess: eval_loss is the mean over all answer tokens, as the training loss is; the batch size is a matter
# of memory only.
# What happens (transformers 5.23.0, torch 2.13.0, 2026-11-28): each batch gives its mean over its own tokens, and eval_loss
# is the mean of these, weighted by rows. With batches of 1 a row with 2 answer tokens counts as much as one with 60; in
# one big batch it counts a thirtieth. Two models change their places.
# Why it matters: load_best_model_at_end, early stopping and exp(eval_loss) as perplexity depend on a memory setting, most
# where short and long answers stand in one set. Compare runs with one eval batch size only, or sum over tokens.
#
# Output seen:
#   torch 2.13.0, transformers 5.23.0
#   guess: eval_loss is the same for each batch size
#   better at long answers: batch 1: 3.446, batch 2: 2.335, batch 32: 2.335, mean over all tokens: 2.335
#   better at short answers: batch 1: 3.055, batch 2: 4.722, batch 32: 4.722, mean over all tokens: 4.722
#   best at batch 1: better at short answers
#   best at batch 32: better at long answers
#   as stated: the order of the two models depends on the batch size
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
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

transformers.logging.set_verbosity_error()
print(f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}")
config = Qwen2Config(
    vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)
generator = torch.Generator().manual_seed(0)


# a question of 4 tokens; a short answer is 2 times token 5, a long one 60 times token 6
def row(long):
    answer = [6] * 60 if long else [5] * 2
    question = [3 if long else 4] + torch.randint(10, 100, (3,), generator=generator).tolist()
    ids = question + answer
    fill = 64 - len(ids)
    return {
        "input_ids": ids + [0] * fill,
        "labels": [-100] * 4 + answer + [-100] * fill,
        "attention_mask": [1] * len(ids) + [0] * fill,
    }


def trained(long, steps):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = [row(long) for _ in range(8)]
    batch = {key: torch.tensor([one[key] for one in rows]) for key in rows[0]}
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


data = [row(long=i % 2 == 0) for i in range(32)]
models = {"better at long answers": trained(True, 14), "better at short answers": trained(False, 25)}
losses = {}
print("guess: eval_loss is the same for each batch size")
for name, model in models.items():
    losses[name] = {}
    for size in (1, 2, 32):
        arguments = TrainingArguments(
            "out", per_device_eval_batch_size=size, use_cpu=True, report_to="none", disable_tqdm=True
        )
        trainer = Trainer(model, arguments, eval_dataset=data)
        trainer.remove_callback(PrinterCallback)
        losses[name][size] = trainer.evaluate()["eval_loss"]
    total = tokens = 0
    with torch.no_grad():
        for one in data:
            count = sum(label != -100 for label in one["labels"])
            total += model(**{k: torch.tensor([v]) for k, v in one.items()}).loss.item() * count
            tokens += count
    print(
        f"{name}: " + ", ".join(f"batch {size}: {loss:.3f}" for size, loss in losses[name].items())
        + f", mean over all tokens: {total / tokens:.3f}"
    )
long, short = losses.values()
print("best at batch 1:", min(losses, key=lambda name: losses[name][1]))
print("best at batch 32:", min(losses, key=lambda name: losses[name][32]))
if not (long[1] > short[1] and long[32] < short[32]):
    sys.exit("changed: the batch size of the evaluation no longer turns the order of the two models")
print("as stated: the order of the two models depends on the batch size")
PY
