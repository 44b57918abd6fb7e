"""How likely a model finds given answers: their log probability after the very prompt it was trained with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from common.conversation import render
from common.conversation.turns import Turn
from common.errors import UserError
from common.inference.prefix_cache import BLOCK, LEAST_SHARED
from common.model.layers import causal_of
from common.model.loss import token_losses
from common.versions import CACHE

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


_Numbered = tuple[int, _Scored]  # with the number of its question


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
    losses = [[0.0] * len(answers) for _, answers in questions]
    counts = [[0] * len(answers) for _, answers in questions]
    for batch, shared in _batches(scored, batch_size, answerer.prefixes.usable):
        places = [(number, answer) for number, one in batch for answer, _, _ in one.targets]
        found = _losses(answerer, [one for _, one in batch], base, shared)
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


def _batches(scored: Sequence[_Numbered], size: int, may_share: bool) -> Iterator[tuple[list[_Numbered], int]]:
    """(sequences of like length to be run together, how many tokens they share at their beginning and read once).

    Sequences stand together that have the most of their ids in common, where this saves LEAST_SHARED tokens or more.
    """
    left: list[_Numbered] = []
    for group in _alike(scored) if may_share else ():
        shared = _shared([one for _, one in group])
        if shared * (len(group) - 1) >= LEAST_SHARED:
            yield from ((batch, shared) for batch in _by_length(group, size))
        else:
            left += group
    yield from ((batch, 0) for batch in _by_length(left if may_share else scored, size))


def _alike(scored: Sequence[_Numbered]) -> Iterator[list[_Numbered]]:
    """Groups of sequences of which each has half of its ids or more in common with the others."""
    group: list[_Numbered] = []
    common = 0
    for item in sorted(scored, key=lambda item: item[1].ids):
        ids = item[1].ids
        same = len(os.path.commonprefix([group[0][1].ids[:common], ids])) if group else 0
        if group and 2 * same < len(ids):
            yield group
            group = []
        common = same if group else len(ids)
        group.append(item)
    if group:
        yield group


def _shared(group: Sequence[_Scored]) -> int:
    """Tokens, in whole blocks, that all sequences begin with and none of which tells of what is to be predicted."""
    first = min(place for one in group for _, place, _ in one.targets)
    return min(first, len(os.path.commonprefix([one.ids for one in group]))) // BLOCK * BLOCK


def _by_length(items: Sequence[_Numbered], size: int) -> list[list[_Numbered]]:
    items = sorted(items, key=lambda item: len(item[1].ids))
    return [items[start : start + size] for start in range(0, len(items), size)]


def _losses(answerer: Answerer, batch: Sequence[_Scored], base: bool, shared: int) -> list[float]:
    """The loss in nats of each target of each sequence, in order; the first `shared` ids of all are the same."""
    device = answerer.net.device
    longest = max(len(one.ids) for one in batch)
    ids = torch.full((len(batch), longest), answerer.pad_id)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(batch):
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
        mask[row, : len(one.ids)] = 1
    rows, positions, targets = zip(
        *((row, place - shared, id_) for row, one in enumerate(batch) for _, place, id_ in one.targets), strict=True
    )
    with answerer.lock, torch.inference_mode(), answerer.chosen(base) as net:
        causal = causal_of(net)
        trunk = causal.get_decoder()
        begun: dict[str, Any] = {"use_cache": False}
        if shared:
            begun = {CACHE: answerer.prefixes.read(trunk, base, batch[0].ids[:shared], len(batch)), "use_cache": True}
        output = trunk(input_ids=ids[:, shared:].to(device), attention_mask=mask.to(device), **begun)
        hidden = output.last_hidden_state
        found = token_losses(
            hidden[list(rows), list(positions)],
            torch.tensor(targets, device=device),
            causal.get_output_embeddings(),
            causal.config.get_text_config().vocab_size,
            softcap=getattr(causal.config, "final_logit_softcapping", None),
        )
    return found.tolist()
