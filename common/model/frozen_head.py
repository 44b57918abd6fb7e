"""Cross entropy and its gradient under a head that is not trained, in one walk over its rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from common.model.frozen_layers import times_transposed, with_pads
from common.model.token_rows import Rows

POSITIONS, BLOCK = 512, 8192  # at most in one product on a CPU, positions and rows of the head: 16 MiB of logits


class FrozenHeadLoss(torch.autograd.Function):
    """The loss under a head that is not trained, or of which some rows are: its gradient is known with the losses.

    So it is computed in the forward pass, in one walk over the head's rows, and no logits are kept. ids [K], values
    [K, H]: the rows of the head that are trained, and what stands there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        softcap: float | None,
        smoothing: float,
        ids: torch.Tensor | None,
        values: torch.Tensor | None,
    ) -> torch.Tensor:
        count, learns = len(hidden), any(ctx.needs_input_grad)
        own = Rows(targets[:0], weight[:0]) if ids is None or values is None else Rows(ids, values.to(weight.dtype))
        parts = zip(with_pads(hidden).split(POSITIONS), with_pads(targets).split(POSITIONS), strict=True)
        found = [_walk(part, weight, wanted[:, None], softcap, smoothing, learns, own) for part, wanted in parts]
        losses, gradient, errors = (torch.cat(each)[:count] for each in zip(*found, strict=True))
        if learns:
            ctx.save_for_backward(gradient.to(hidden.dtype), *(() if values is None else (hidden, errors)))
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, *of_rows = ctx.saved_tensors
        found = gradient * upstream[:, None].to(gradient.dtype)
        if not of_rows:
            return found, None, None, None, None, None, None
        hidden, errors = of_rows
        return found, None, None, None, None, None, (errors * upstream[:, None]).T @ hidden.float()


def _walk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    smoothing: float,
    learns: bool,
    own: Rows,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(losses [N], their gradient by hidden [N, H], and by the logits of `own` [N, K]) in fp32; targets [N, 1].

    A block of the head's rows is read once for both its products, and its logits stay in the processor's cache. Sums
    are scaled down when a block has a larger logit than those before, as in online softmax (Milakov and Gimelshein
    2018, arXiv 1805.02867). The wanted piece's part of the gradient is kept out of them: in bf16 the difference of its
    probability and 1 would be lost.
    """
    reached = total = hidden.new_zeros(len(hidden), 1, dtype=torch.float32)
    largest, gradient = total + torch.finfo(total.dtype).min, torch.zeros_like(hidden, dtype=total.dtype)
    for start, block, logits, trained in _blocks(hidden, weight, softcap, own):
        slope = _slope(logits, softcap) if learns and softcap else None
        column = targets - start
        here, column = (column >= 0) & (column < len(block)), column.clamp(0, len(block) - 1)
        reached = torch.where(here, logits.gather(1, column), reached)
        before, largest = largest, torch.maximum(largest, logits.amax(1, keepdim=True))
        shrink, error = (before - largest).exp_(), logits.sub_(largest).exp_()
        total = total * shrink + error.sum(1, keepdim=True)
        if learns:
            error.scatter_(1, column, error.gather(1, column).masked_fill_(here, 0.0))
            error = _without(error if slope is None else error.mul_(slope), trained)
            gradient.mul_(shrink).add_(error.to(block.dtype) @ block)
    normaliser = largest + total.log()
    losses = normaliser - (1 - smoothing) * reached
    if smoothing:
        all_logits, all_rows = _of_all(hidden, weight, softcap, own)
        losses -= smoothing / len(weight) * all_logits
    if not learns:
        return losses[:, 0], gradient, gradient[:, :0]
    error = ((reached - normaliser).exp_() - (1 - smoothing)) * _slope(reached, softcap)
    own_logits, mine = _capped(hidden @ own.values.T, softcap), targets == own.ids
    own_slope = _slope(own_logits, softcap)
    errors = ((own_logits - normaliser).exp_() - (1 - smoothing) * mine) * own_slope
    gradient.div_(total).add_(error.masked_fill_(mine.any(1, keepdim=True), 0.0) * weight[targets[:, 0]])
    gradient += errors @ own.values.float()
    if smoothing:
        gradient -= smoothing / len(weight) * all_rows
        errors = errors - smoothing / len(weight) * own_slope
    return losses[:, 0], gradient, errors


def _blocks(
    hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None, own: Rows
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(first row, rows [W, H], their logits [N, W] fp32, which of these are of `own` [k]) of each block of a head."""
    width = BLOCK if hidden.device.type == "cpu" else 8 * BLOCK  # a GPU's products want more of them
    own_logits = _capped(hidden @ own.values.T, softcap)
    for start in range(0, len(weight), width):
        block, trained = weight[start : start + width], own.ids
        logits = _capped(times_transposed(hidden, block), softcap)
        if len(own.ids):
            here = ((own.ids >= start) & (own.ids < start + width)).nonzero()[:, 0]
            trained = own.ids[here] - start
            logits[:, trained] = own_logits[:, here]
        yield start, block, logits, trained


def _of_all(
    hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None, own: Rows
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of all logits [N, 1], its gradient by hidden [N, H] or [H]) in fp32."""
    values = own.values.float()
    if not softcap:
        rows = weight.sum(0, dtype=torch.float32) - weight[own.ids].float().sum(0) + values.sum(0)
        return hidden.float() @ rows[:, None], rows
    gradient = _slope(_capped(hidden @ own.values.T, softcap), softcap) @ values
    total = gradient.new_zeros(len(hidden), 1)
    for _, block, logits, trained in _blocks(hidden, weight, softcap, own):
        total += logits.sum(1, keepdim=True)
        gradient += _without(_slope(logits, softcap), trained).to(block.dtype) @ block
    return total, gradient


def _without(errors: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """errors [N, W] with zeros in these columns [k], in its memory."""
    return errors.index_fill_(1, columns, 0.0) if len(columns) else errors


def _capped(products: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Logits in fp32, in the memory of `products` where these are fp32."""
    logits = products.float()
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


def _slope(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """The derivative of capped logits by what was capped."""
    return 1 - (logits / softcap).square() if softcap else torch.ones_like(logits)
