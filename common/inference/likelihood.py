"""How likely a model finds given answers: their log probability after the very prompt it was trained with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from common.conversation import render
from common.conversation.turns import Turn
from common.errors import UserError
from common.model.layers import causal_of
from common.model.loss import token_losses

if TYPE_CHECKING:
    from common.inference.answerer import Answerer


class Fit(NamedTuple):
    """A model's view of one answer: its loss in nats over `ids` ids (the stop id left out)."""

    loss: float
    ids: int


class _Scored(NamedTuple):
    """Ids to run through the model, and which of its outputs count: (answer number, position, id to be predicted)."""

    ids: list[int]
    targets: list[tuple[int, int, int]]


def fits(
    answerer: Answerer,
    questions: Sequence[tuple[Sequence[Turn], Sequence[str]]],
    base: bool = False,
    batch_size: int = 32,
) -> list[list[Fit]]:
    """A list of Fits for each (turns, answers) of `questions`, in order.

    answerer: an answerer.Answerer; turns end with a question, rendered as in training; answers are texts. base:
    without the adapter. batch_size: sequences run together. UserError where a prompt's headers exceed the answerer's
    limit, or an answer has no ids.
    """
    scored = [(number, one) for number, question in enumerate(questions) for one in _scored(answerer, *question)]
    scored.sort(key=lambda item: len(item[1].ids))
    losses = [[0.0] * len(answers) for _, answers in questions]
    counts = [[0] * len(answers) for _, answers in questions]
    for start in range(0, len(scored), batch_size):
        batch = scored[start : start + batch_size]
        places = [(number, answer) for number, one in batch for answer, _, _ in one.targets]
        found = _losses(answerer, [one for _, one in batch], base)
        for (number, answer), loss in zip(places, found, strict=True):
            losses[number][answer] += loss
            counts[number][answer] += 1
    return [list(map(Fit, *parts)) for parts in zip(losses, counts, strict=True)]


def _scored(answerer: Answerer, turns: Sequence[Turn], answers: Sequence[str]) -> Iterator[_Scored]:
    """One _Scored for all answers that differ in their last id alone, as letters do; or else one for each."""
    prompt = answerer.fitted_ids(turns)
    endings = [_answer_ids(answerer, turns[-1], answer) for answer in answers]
    if len({tuple(ending[:-1]) for ending in endings}) == 1:
        groups = [list(enumerate(endings))]
    else:
        groups = [[item] for item in enumerate(endings)]
    for group in groups:
        targets = [
            (answer, len(prompt) - 1 + place, id_) for answer, ending in group for place, id_ in enumerate(ending)
        ]
        yield _Scored(prompt + group[0][1][:-1], targets)


def _answer_ids(answerer: Answerer, question: Turn, text: str) -> list[int]:
    """Ids of `text` as an answer is trained on, without its stop id."""
    rendered = answerer.prompt.render(answerer.tokenizer, [question, Turn("assistant", text)], answerer.style)
    ids = list(rendered[-1].ids)[:-1]
    if rendered[-1].part != render.ANSWER or not ids:
        raise UserError(f"{text!r}: 选项没有 token the option has no ids of its own")
    return ids


def _losses(answerer: Answerer, batch: Sequence[_Scored], base: bool) -> list[float]:
    """The loss in nats of each target of each sequence, in order."""
    device = answerer.net.device
    longest = max(len(one.ids) for one in batch)
    ids = torch.full((len(batch), longest), answerer.pad_id)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(batch):
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
        mask[row, : len(one.ids)] = 1
    rows, positions, targets = zip(
        *((row, place, id_) for row, one in enumerate(batch) for _, place, id_ in one.targets), strict=True
    )
    with answerer.lock, torch.inference_mode(), answerer.chosen(base) as net:
        causal = causal_of(net)
        trunk = causal.get_decoder()
        hidden = trunk(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).last_hidden_state
        found = token_losses(
            hidden[list(rows), list(positions)],
            torch.tensor(targets, device=device),
            causal.get_output_embeddings(),
            causal.config.get_text_config().vocab_size,
            softcap=getattr(causal.config, "final_logit_softcapping", None),
        )
    return found.tolist()
