"""Makes a family's embedded base model: a tokenizer of characters and a small pre-training on texts of data/."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from tqdm import tqdm

from common import files
from common.config import ROOT
from common.conversation.render import Sample, training_sample
from common.conversation.turns import Turn
from common.model.loss import supervised
from common.training.batches import collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.conversation.family import Family

BATCH, SEED, WARMUP, LIMIT = 16, 42, 200, 2048


class Phase(NamedTuple):
    """A part of the pre-training: how many documents, which shares of them are what, and the peak learning rate."""

    documents: int
    shop_share: float
    names_share: float
    learning_rate: float


PHASES = (Phase(60_000, 0.45, 0, 3e-3), Phase(34_000, 0.8, 0, 2e-3), Phase(44_000, 0.95, 0, 2.5e-3))


def as_text(document: str, rng: random.Random) -> list[Turn]:
    """A document as one running text."""
    return [Turn("text", document)]


def build(
    make_tokenizer: Callable[[Sequence[str]], PreTrainedTokenizerBase],
    make_model: Callable[[PreTrainedTokenizerBase], PreTrainedModel],
    prompt: Family,
    folder: str | Path,
    phases: Sequence[Phase] = PHASES,
    turns_of: Callable[[str, random.Random], list[Turn]] = as_text,
) -> None:
    """Pre-train `make_model(tokenizer)` on the documents of data/make_data.py and save it into `folder`.

    make_tokenizer(characters) gets every character of the texts. turns_of(document, rng) is a document as a
    conversation, which `prompt` renders. The same seed, inputs and library versions give the same weights; inputs.json
    records them. A test compares its hash of the inputs with what data/ would give now.
    """
    texts = [list(documents(phases, number)) for number in range(len(phases))]
    tokenizer = make_tokenizer(sorted(set("".join(text for part in texts for text in part))))
    torch.manual_seed(SEED)
    model = make_model(tokenizer)
    used = {tokenizer.pad_token_id}
    for number, phase in enumerate(phases):
        rng = random.Random(SEED + number)
        samples = [
            training_sample(tokenizer, prompt, turns_of(text, rng), "chat", "answer", LIMIT, LIMIT)
            for text in texts[number]
        ]
        used.update(id_ for sample in samples for id_ in sample.input_ids)
        with supervised(model):
            loss = pretrain(model, samples, phase.learning_rate)
        model.to(torch.bfloat16).float()  # a phase goes on from what would be shipped,
        torch.manual_seed(SEED + number + 1)  # in an order that does not depend on what came before
    tell_control_tokens_apart(model, set(tokenizer.all_special_ids) - used)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {"phases": phases, "inputs_sha256": inputs_hash(phases), "seed": SEED, "final_loss": round(loss, 4)}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
    files.write_json(Path(folder) / "inputs.json", record | {"versions": versions})


def tell_control_tokens_apart(model: PreTrainedModel, unused: set[int]) -> None:
    """Give each control token no text `used` a direction of its own: their rows have all drifted to the same place.

    Without it an adapter cannot ask for <end_of_turn> and not for some other unused row.
    """
    rows = model.get_input_embeddings().weight.data
    size = rows[len(rows) // 2 :].norm(dim=1).mean()
    for id_ in sorted(unused):
        noise = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(SEED + id_))
        rows[id_] += (noise / noise.norm() * size).to(rows.dtype)


def documents(phases: Sequence[Phase], number: int) -> Iterator[str]:
    """The pre-training texts of a phase, none of which is a row of a fine-tuning task."""
    sys.path.insert(0, str(ROOT))
    from data.make_data import pretrain_documents

    phase = phases[number]
    return pretrain_documents(phase.documents, SEED + number, phase.shop_share, phase.names_share)


def inputs_hash(phases: Sequence[Phase] = PHASES) -> str:
    """sha256, hex, of what the pre-training reads: the first 1,000 documents of each phase, and the plan."""
    digest = hashlib.sha256(repr(([tuple(phase) for phase in phases], BATCH, WARMUP, SEED)).encode())
    for number in range(len(phases)):
        for text, _ in zip(documents(phases, number), range(1000), strict=False):
            digest.update(text.encode())
    return digest.hexdigest()


def pretrain(model: PreTrainedModel, samples: Sequence[Sample], learning_rate: float) -> float:
    """One pass over `samples` with AdamW and a cosine schedule; the mean loss of the last 100 steps in nats a token."""
    batches = list(_batches(samples))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, len(batches)))
    losses = []
    model.train()
    with tqdm(batches, desc="预训练 pre-training") as bar:
        for batch in bar:
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix_str(f"loss {losses[-1]:.3f}")
    last = losses[-100:]
    return sum(last) / len(last)


def _rate(step: int, steps: int) -> float:
    """The learning rate of a step as a share of its peak: up over WARMUP steps, then a cosine down to a twentieth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def _batches(samples: Sequence[Sample]) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of samples of like length in a random order: input_ids, labels [B, T]."""
    window = BATCH * 100
    found: list[list[Sample]] = []
    for start in range(0, len(samples), window):
        part = sorted(samples[start : start + window], key=lambda sample: len(sample.input_ids))
        found += [part[at : at + BATCH] for at in range(0, len(part), BATCH)]
    for number in torch.randperm(len(found)).tolist():
        rows = [{"input_ids": s.input_ids, "labels": s.labels, "where": ""} for s in found[number]]
        batch = collate(rows, pad_id=0)
        yield {name: batch[name] for name in ("input_ids", "labels")}
