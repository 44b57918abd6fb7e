"""The next id of each row of a batch: greedy or drawn, each row by its own settings and its own random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from common.engine.request import Row, TopIds
    from common.inference.answerer import Sampling

FEW = 1024  # ids that are sorted at first where no top_k says how many


def penalised(logits: torch.Tensor, row: Row) -> torch.Tensor:
    """A row's logits [V] after its penalties, changed in place.

    Repetition penalty: Keskar et al. 2019, arXiv 1909.05858, over prompt and answer; presence and frequency penalty:
    OpenAI's, over the answer.
    """
    ask = row.ask
    if ask.sampling.repetition_penalty != 1:
        seen = torch.tensor([*ask.ids, *row.counts], device=logits.device)  # one that is there twice is set twice
        scores, penalty = logits[seen], ask.sampling.repetition_penalty
        logits[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
    if row.counts and (ask.presence_penalty or ask.frequency_penalty):
        ids = torch.tensor(list(row.counts), device=logits.device)
        times = torch.tensor(list(row.counts.values()), device=logits.device, dtype=logits.dtype)
        logits[ids] -= ask.presence_penalty + ask.frequency_penalty * times
    return logits


def next_ids(logits: torch.Tensor, rows: Sequence[Row]) -> list[int | None]:
    """The next id of each row, None where its logits are no numbers; logits [B, V] are changed."""
    for number, row in enumerate(rows):
        penalised(logits[number], row)
    highest, chosen = logits.max(-1)  # nan where one is
    known = highest.isfinite().tolist()
    drawn = [number for number, row in enumerate(rows) if known[number] and row.ask.sampling.do_sample]
    if drawn:
        found = draw(
            logits[drawn],
            [rows[number].ask.sampling for number in drawn],
            [rows[number].random.random() for number in drawn],
        )
        chosen[drawn] = found.to(chosen.device)
    return [id_ if is_known else None for id_, is_known in zip(chosen.tolist(), known, strict=True)]


def draw(logits: torch.Tensor, samplings: Sequence[Sampling], numbers: Sequence[float]) -> torch.Tensor:
    """Ids [B] drawn from logits [B, V] by temperature, top_k, top_p, min_p and one random number in [0, 1) a row.

    The same row with the same number draws the same id in whatever batch it stands. The four act in this order, as in
    transformers; min_p (Nguyen et al. 2024, arXiv 2407.01082) is a share of the highest chance.
    """
    if logits.device.type == "mps":  # Apple's GPUs have no float64
        logits = logits.cpu()
    size = logits.shape[-1]
    ids, known = _draw(logits, samplings, numbers, min(size, max(s.top_k or FEW for s in samplings)))
    if left := [number for number, is_known in enumerate(known.tolist()) if not is_known]:
        ids[left], _ = _draw(logits[left], [samplings[n] for n in left], [numbers[n] for n in left], size)
    return ids


def _draw(
    logits: torch.Tensor, samplings: Sequence[Sampling], numbers: Sequence[float], width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B] drawn as `draw` does, and bool [B] whether `width` highest of each row are enough to know its id."""
    device, size = logits.device, logits.shape[-1]
    top_k = torch.tensor([min(s.top_k or size, size) for s in samplings], device=device)[:, None]
    top_p = torch.tensor([s.top_p for s in samplings], device=device, dtype=torch.float64)[:, None]
    min_p = torch.tensor([s.min_p for s in samplings], device=device, dtype=torch.float64)[:, None]
    temperature = torch.tensor([s.temperature for s in samplings], device=device)[:, None]
    aims = torch.tensor(numbers, device=device, dtype=torch.float64)[:, None]
    scores, ids = logits.topk(width)  # from the highest down
    of_all, highest = (top_k == size)[:, 0], scores[:, :1]
    scores = (scores - highest) / temperature
    scores = scores.masked_fill(torch.arange(width, device=device) >= top_k, float("-inf"))
    chances = scores.double().exp()
    totals = chances.sum(-1, keepdim=True)
    rest = (logits[of_all] - highest[of_all]) / temperature[of_all]
    totals[of_all] = rest.exp_().sum(-1, keepdim=True, dtype=torch.float64)
    chances /= totals
    sums = chances.cumsum(-1)
    chances = chances.masked_fill((sums - chances >= top_p) & (sums > chances), 0)  # the first always stays
    chances = chances.masked_fill(chances < min_p * chances[:, :1], 0)
    sums = chances.cumsum(-1)
    uncut = of_all[:, None] & (top_p == 1) & (min_p == 0)
    aims = aims * torch.where(uncut, 1, sums[:, -1:])
    picked = torch.searchsorted(sums, aims, right=True)
    possible = (chances > 0).sum(-1, keepdim=True)
    known = (top_k <= width) | (chances[:, -1:] == 0) | uncut & (aims < sums[:, -1:])
    return ids.gather(1, torch.minimum(picked, possible - 1))[:, 0], known[:, 0]


def logprobs(
    logits: torch.Tensor, chosen: Sequence[int | None], alternatives: Sequence[int | None]
) -> list[tuple[float, TopIds] | None]:
    """Per row None or (log probability of the chosen id, [(id, log probability)] of the most probable ones).

    logits [B, V] as the model gave them; alternatives: how many a row wants, None for no log probabilities at all.
    """
    found: list[tuple[float, TopIds] | None] = [None] * len(chosen)
    for number, (id_, count) in enumerate(zip(chosen, alternatives, strict=True)):
        if id_ is not None and count is not None:
            scores = logits[number].log_softmax(-1)
            best = scores.topk(count)
            top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            found[number] = (scores[id_].item(), top)
    return found
