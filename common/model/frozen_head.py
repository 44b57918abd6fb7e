"""Cross entropy and its gradient under a head that is not trained, in one walk over its rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from common.model.frozen_layers import autocast_in_force, fitting, is_frozen, times_transposed, with_pads
from common.model.token_rows import Rows
from common.peft_names import LoraLinear

POSITIONS, BLOCK = 512, 8192  # at most in one product on a CPU, positions and rows of the head: 16 MiB of logits


def block_rows(device_type: str) -> int:
    """Rows of a head in one product; a GPU's want more of them."""
    return BLOCK if device_type == "cpu" else 8 * BLOCK


class Head(NamedTuple):
    """A head that is not trained, and what plain LoRA adds: rows [weight | up], for positions [hidden | low]."""

    weight: torch.Tensor  # [V, H]
    up: torch.Tensor | None  # [V, r], trained
    hidden: torch.Tensor  # some positions, or none: `weight` may lie in 16 bits under them, see `fitting`

    def rows(self, which: slice | torch.Tensor) -> torch.Tensor:
        """Some of its rows, [k, H + r]."""
        found = fitting(self.weight[which], self.hidden)
        return found if self.up is None else torch.cat([found, self.up[which].to(found.dtype)], dim=1)


def plain_lora(head: torch.nn.Module) -> str | None:
    """The name of the one plain LoRA that is at work on a frozen head, else None."""
    if type(head) is not LoraLinear or head.disable_adapters or head.merged or not is_frozen(head.get_base_layer()):
        return None
    names = [name for name in head.active_adapters if name in head.lora_A]
    if len(names) != 1 or head.lora_variant or head.lora_B[names[0]].bias is not None:
        return None
    return names[0]


def with_lora(head: torch.nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """(positions [N, H + r], weight [V, H], up [V, r]) of a frozen head with one plain LoRA on it, else None."""
    name = plain_lora(head)
    if name is None:
        return None
    down, up, dropout = (part[name] for part in (head.lora_A, head.lora_B, head.lora_dropout))
    low = down(dropout(hidden.to(down.weight.dtype))) * head.scaling[name]
    return torch.cat([hidden, low.to(hidden.dtype)], dim=1), head.get_base_layer().weight, up.weight


class FrozenHeadLoss(torch.autograd.Function):
    """The loss under a head that is not trained, or of which some rows are: its gradient is known with the losses.

    So it is computed in the forward pass, in one walk over the head's rows, and no logits are kept. up: of Head, whose
    gradient takes a second walk. ids [K], values [K, H]: the rows of the head that are trained, and what stands there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        up: torch.Tensor | None,
        targets: torch.Tensor,
        softcap: float | None,
        smoothing: float,
        ids: torch.Tensor | None,
        values: torch.Tensor | None,
    ) -> torch.Tensor:
        count, learns, head = len(hidden), any(ctx.needs_input_grad), Head(weight, up, hidden[:0])
        own = Rows(targets[:0], head.rows(targets[:0])) if ids is None or values is None else Rows(ids, values)
        own = Rows(own.ids, own.values.to(head.rows(targets[:0]).dtype))
        parts = zip(with_pads(hidden).split(POSITIONS), with_pads(targets).split(POSITIONS), strict=True)
        found = [_walk(part, head, wanted[:, None], softcap, smoothing, learns, own) for part, wanted in parts]
        losses, gradient, errors, normaliser = (torch.cat(each)[:count] for each in zip(*found, strict=True))
        if learns:
            again = (hidden, errors, normaliser, targets, weight, up) if own.ids.numel() or up is not None else ()
            ctx.save_for_backward(gradient.to(hidden.dtype), *again)
        ctx.softcap, ctx.smoothing, ctx.autocast = softcap, smoothing, autocast_in_force(hidden)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, *again = ctx.saved_tensors
        upstream = upstream[:, None]
        found, of_up, of_rows = gradient * upstream.to(gradient.dtype), None, None
        if again:
            hidden, errors, normaliser, targets, weight, up = again
            of_rows = (errors * upstream).T @ hidden.float() if ctx.needs_input_grad[-1] else None
            if up is not None:
                with ctx.autocast():
                    of_up = _walk_back(
                        hidden,
                        Head(weight, up, hidden[:0]),
                        targets[:, None],
                        ctx.softcap,
                        ctx.smoothing,
                        normaliser,
                        upstream,
                    )
        return found, None, of_up, None, None, None, None, of_rows


def _walk(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    softcap: float | None,
    smoothing: float,
    learns: bool,
    own: Rows,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(losses [N], their gradient by hidden [N, H], by the logits of `own` [N, K], log sum of exp [N, 1]) in fp32.

    targets [N, 1].

    A block of the head's rows is read once for both its products, and its logits stay in the processor's cache. Sums
    are scaled down when a block has a larger logit than those before, as in online softmax (Milakov and Gimelshein
    2018, arXiv 1805.02867). The wanted piece's part of the gradient is kept out of them: in bf16 the difference of its
    probability and 1 would be lost.
    """
    reached = total = hidden.new_zeros(len(hidden), 1, dtype=torch.float32)
    largest, gradient = total + torch.finfo(total.dtype).min, torch.zeros_like(hidden, dtype=total.dtype)
    for start, block, logits, trained in _blocks(hidden, head, softcap, own):
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
        all_logits, all_rows = _of_all(hidden, head, softcap, own)
        losses -= smoothing / len(head.weight) * all_logits
    if not learns:
        return losses[:, 0], gradient, gradient[:, :0], normaliser
    error = ((reached - normaliser).exp_() - (1 - smoothing)) * _slope(reached, softcap)
    own_logits, mine = _capped(hidden @ own.values.T, softcap), targets == own.ids
    own_slope = _slope(own_logits, softcap)
    errors = ((own_logits - normaliser).exp_() - (1 - smoothing) * mine) * own_slope
    gradient.div_(total).add_(error.masked_fill_(mine.any(1, keepdim=True), 0.0) * head.rows(targets[:, 0]))
    gradient += errors @ own.values.float()
    if smoothing:
        gradient -= smoothing / len(head.weight) * all_rows
        errors = errors - smoothing / len(head.weight) * own_slope
    return losses[:, 0], gradient, errors, normaliser


def _walk_back(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    softcap: float | None,
    smoothing: float,
    normaliser: torch.Tensor,
    upstream: torch.Tensor,
) -> torch.Tensor:
    """The gradient of losses by `head.up`, [V, r] fp32; normaliser: of _walk; upstream [N, 1]: by the losses."""
    rank = head.up.shape[1] if head.up is not None else 0
    found = normaliser.new_zeros(len(head.weight), rank)
    none = Rows(targets[:0, 0], head.rows(targets[:0, 0]))
    columns = [with_pads(each).split(POSITIONS) for each in (hidden, targets, normaliser, upstream)]
    for part, wanted, largest, weights in zip(*columns, strict=True):
        for start, block, logits, _ in _blocks(part, head, softcap, none):
            slope = _slope(logits, softcap) if softcap else None
            column = wanted - start
            here, column = (column >= 0) & (column < len(block)), column.clamp(0, len(block) - 1)
            error = logits.sub_(largest).exp_().sub_(smoothing / len(head.weight))
            error.scatter_add_(1, column, (smoothing - 1) * here.to(error.dtype))
            error = (error if slope is None else error.mul_(slope)).mul_(weights)
            found[start : start + len(block)] += error.T @ part[:, -rank:].float()
    return found


def _blocks(
    hidden: torch.Tensor, head: Head, softcap: float | None, own: Rows
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(first row, rows [W, H], their logits [N, W] fp32, which of these are of `own` [k]) of each block of a head."""
    width = block_rows(hidden.device.type)
    own_logits = _capped(hidden @ own.values.T, softcap)
    for start in range(0, len(head.weight), width):
        block, trained = head.rows(slice(start, start + width)), own.ids
        logits = _capped(times_transposed(hidden, block), softcap)
        if len(own.ids):
            here = ((own.ids >= start) & (own.ids < start + width)).nonzero()[:, 0]
            trained = own.ids[here] - start
            logits[:, trained] = own_logits[:, here]
        yield start, block, logits, trained


def _of_all(hidden: torch.Tensor, head: Head, softcap: float | None, own: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of all logits [N, 1], its gradient by hidden [N, H] or [H]) in fp32."""
    values = own.values.float()
    if not softcap:
        rows = head.weight.sum(0, dtype=torch.float32)
        rows = rows if head.up is None else torch.cat([rows, head.up.sum(0, dtype=torch.float32)])
        rows = rows - head.rows(own.ids).float().sum(0) + values.sum(0)
        return hidden.float() @ rows[:, None], rows
    gradient = _slope(_capped(hidden @ own.values.T, softcap), softcap) @ values
    total = gradient.new_zeros(len(hidden), 1)
    for _, block, logits, trained in _blocks(hidden, head, softcap, own):
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
