"""Makes a family's embedded base model: a tokenizer of characters and a small pre-training on texts of data/."""

import hashlib
import importlib.metadata
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from common import run
from common.config import ROOT
from common.loss import use_supervised_loss
from common.pieces import IGNORED, encode_text

BATCH, SEED, WARMUP = 16, 42, 200
PHASES = [(60_000, 0.45, 3e-3), (34_000, 0.8, 2e-3), (44_000, 0.95, 2.5e-3)]  # documents, share of shop texts, rate


def build(make_tokenizer, make_model, folder):
    """Pre-train `make_model(tokenizer)` on the documents of data/make_data.py and save it into `folder`.

    make_tokenizer(characters) gets every character of the texts. The same seed, inputs and library versions give the
    same weights; inputs.json records them. A test compares its hash of the inputs with what data/ would give now.
    """
    phases = [list(documents(number)) for number in range(len(PHASES))]
    tokenizer = make_tokenizer(sorted(set("".join(text for texts in phases for text in texts))))
    torch.manual_seed(SEED)
    model = make_model(tokenizer)
    use_supervised_loss(model)
    for number, (texts, (_, _, learning_rate)) in enumerate(zip(phases, PHASES, strict=True)):
        loss = pretrain(model, tokenizer, texts, learning_rate)
        model.to(torch.bfloat16).float()  # a phase goes on from what would be shipped,
        torch.manual_seed(SEED + number + 1)  # in an order that does not depend on what came before
    tell_control_tokens_apart(model, tokenizer)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {"phases": PHASES, "inputs_sha256": inputs_hash(), "seed": SEED, "final_loss": round(loss, 4)}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
    run.write_json(Path(folder) / "inputs.json", record | {"versions": versions})


def tell_control_tokens_apart(model, tokenizer):
    """Give each control token a direction of its own: rows that no text used have all drifted to the same place.

    Without it an adapter cannot ask for <end_of_turn> and not for some other unused row.
    """
    rows = model.get_input_embeddings().weight.data
    size = rows[len(rows) // 2 :].norm(dim=1).mean()
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    for id_ in sorted(set(tokenizer.all_special_ids) - used):
        noise = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(SEED + id_))
        rows[id_] += (noise / noise.norm() * size).to(rows.dtype)


def documents(phase):
    """The pre-training texts of a phase, none of which is a row of a fine-tuning task."""
    sys.path.insert(0, str(ROOT))
    from data.make_data import pretrain_documents

    count, shop_share, _ = PHASES[phase]
    return pretrain_documents(count, SEED + phase, shop_share)


def inputs_hash():
    """sha256, hex, of what the pre-training reads: the first 1,000 documents of each phase, and the plan."""
    digest = hashlib.sha256(repr((PHASES, BATCH, WARMUP, SEED)).encode())
    for phase in range(len(PHASES)):
        for text, _ in zip(documents(phase), range(1000), strict=False):
            digest.update(text.encode())
    return digest.hexdigest()


def pretrain(model, tokenizer, texts, learning_rate):
    """One pass over `texts` with AdamW and a cosine schedule; the mean loss of the last 100 steps in nats a token."""
    batches = list(_batches(tokenizer, texts))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, len(batches)))
    losses = []
    model.train()
    with tqdm(batches, desc="预训练 pre-training") as bar:
        for ids in bar:
            mask = (ids != IGNORED).long()
            loss = model(input_ids=ids.clamp(min=0), attention_mask=mask, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix_str(f"loss {losses[-1]:.3f}")
    last = losses[-100:]
    return sum(last) / len(last)


def _rate(step, steps):
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def _batches(tokenizer, texts):
    """Batches [B, T] of documents of like length in a random order, `bos text eos`, padded with -100."""
    rows = [[tokenizer.bos_token_id, *encode_text(tokenizer, text), tokenizer.eos_token_id] for text in texts]
    window = BATCH * 100
    found = []
    for start in range(0, len(rows), window):
        part = sorted(rows[start : start + window], key=len)
        found += [part[at : at + BATCH] for at in range(0, len(part), BATCH)]
    for number in torch.randperm(len(found)).tolist():
        longest = max(map(len, found[number]))
        yield torch.tensor([row + [IGNORED] * (longest - len(row)) for row in found[number]])
