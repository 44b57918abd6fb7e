"""Cross entropy over supervised positions only, a chunk of logits at a time, never [batch, length, vocabulary]."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from common.conversation.render import IGNORED
from common.model.frozen_head import POSITIONS, FrozenHeadLoss, block_rows, plain_lora, with_lora
from common.model.frozen_layers import is_frozen, replaced
from common.model.layers import causal_of
from common.model.token_rows import Rows, matrix_of, rows_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

BALANCE = "load_balancing_loss_func"  # of the modules of transformers' models whose routers have a loss of their own
LOGITS, ROWS = 1 << 24, 128  # of logits alive at once on a CPU: 64 MiB in fp32, and more rows are no faster


def chunk_rows(vocabulary: int, device_type: str) -> int:
    """Rows of logits alive at once; a GPU's matrix products want more of them."""
    times = 1 if device_type == "cpu" else 4
    return max(16, min(times * LOGITS // vocabulary, times * ROWS) // 16 * 16)


def logits_alive(net: PreTrainedModel | PeftModel, device_type: str) -> int:
    """How many logits the loss of `net` holds at once, at most."""
    head, vocabulary = net.get_output_embeddings(), net.config.get_text_config().vocab_size
    if plain_lora(head) or is_frozen(matrix_of(head)):
        return POSITIONS * min(block_rows(device_type), vocabulary)
    return chunk_rows(vocabulary, device_type) * vocabulary


@contextlib.contextmanager
def supervised(model: PreTrainedModel | PeftModel, smoothing: float = 0.0) -> Iterator[None]:
    """Within, `model(input_ids, labels=…)` returns the chunked loss; without labels its forward stays as it is.

    `model` is a transformers causal LM (peft's wrapper around it included). labels [B, T] are aligned with input_ids,
    -100 is not counted. The loss is the sum over counted ids divided by `num_items_in_batch`, or by their number where
    that is not given. In evaluation mode `logits` holds [B, 2] instead: each row's summed loss and counted ids.
    smoothing: share of the target that all pieces get alike, in training mode.

    Where the model adds the auxiliary loss of its routers (`router_weight`), so does this one, by the share of the
    counted ids that are in the batch, and `aux_loss` says what was added. It is taken over the ids that `present`
    [B, T] (or attention_mask) marks with 1.
    """
    causal = causal_of(model)
    head = causal.get_output_embeddings()
    with replaced({causal: _forward_with_loss(causal, smoothing), head: _forward_of_head(head)}):
        causal.accepts_loss_kwargs = True  # the Trainer then hands in num_items_in_batch, of the whole batch
        yield


def router_weight(causal: PreTrainedModel) -> float | None:
    """Times the auxiliary loss of its routers that the model adds to its loss; None where its class has no such loss.

    0.0 where its config does not ask for it. Switch Transformer's loss, Fedus et al. 2021, arXiv 2101.03961.
    """
    if not hasattr(sys.modules[type(causal).__module__], BALANCE):
        return None
    return float(causal.router_aux_loss_coef) if getattr(causal.config, "output_router_logits", False) else 0.0


def without_routers(net: PreTrainedModel | PeftModel) -> dict[str, bool]:
    """Arguments by which a forward or generate leaves out the routers' loss, which takes no mask of cached ids."""
    return {"output_router_logits": False} if router_weight(causal_of(net)) else {}


def show_routers(net: PreTrainedModel | PeftModel) -> None:
    """Print whether the loss of a model with routers includes their auxiliary loss; nothing of other models."""
    weight = router_weight(causal_of(net))
    if weight is None:
        return
    added = f"+ {weight:g} × " if weight else "不加 without "
    told = f"output_router_logits {'true' if weight else 'false'} in config.json"
    print(f"损失 loss: 交叉熵 cross entropy {added}路由器的辅助损失 the routers' auxiliary loss ({told})")


def _routers_loss(causal: PreTrainedModel) -> Callable[..., torch.Tensor] | None:
    """loss(router_logits, present) as the model adds it to its cross entropy; None where it adds none."""
    weight = router_weight(causal)
    if not weight:
        return None
    balance = getattr(sys.modules[type(causal).__module__], BALANCE)

    def loss(router_logits: tuple[torch.Tensor, ...], present: torch.Tensor | None) -> torch.Tensor:
        return weight * balance(router_logits, causal.num_experts, causal.num_experts_per_tok, present)

    return loss


def _forward_with_loss(causal: PreTrainedModel, smoothing: float) -> Callable[..., Any]:
    plain_forward, routers_loss = causal.forward, _routers_loss(causal)

    @functools.wraps(type(causal).forward)  # generate looks up in its signature what a model takes
    def forward(
        self: PreTrainedModel,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        present: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
        if labels is None:
            return plain_forward(input_ids=input_ids, **kwargs)
        states = self.get_decoder()(input_ids=input_ids, use_cache=False, **kwargs)
        hidden = states.last_hidden_state
        targets = labels[:, 1:]
        counted = targets != IGNORED
        softcap = getattr(self.config, "final_logit_softcapping", None)
        smoothed = smoothing if self.training else 0.0
        vocabulary = self.config.get_text_config().vocab_size
        losses = self.get_output_embeddings()(hidden[:, :-1][counted], targets[counted], vocabulary, softcap, smoothed)
        total = counted.sum() if num_items_in_batch is None else num_items_in_batch
        loss, logits = losses.sum() / total, None if self.training else _row_sums(losses, counted)
        if routers_loss is None or not len(losses):
            return CausalLMOutputWithPast(loss=loss, logits=logits)
        mask = kwargs.get("attention_mask") if present is None else present
        added = routers_loss(states.router_logits, mask).to(loss.device) * len(losses) / total
        return MoeCausalLMOutputWithPast(loss=loss + added, aux_loss=added if self.training else None, logits=logits)

    return forward


def _forward_of_head(head: torch.nn.Module) -> Callable[..., torch.Tensor]:
    """A forward by which `head(hidden, targets, vocabulary, …)` returns the losses; without targets it is the head's.

    A call of the head lets FSDP2 and ZeRO-3 put its weight together, of which each process holds a part.
    """
    project, matrix = head.forward, matrix_of(head)
    is_linear = type(matrix) is torch.nn.Linear and matrix.bias is None

    def forward(
        self: torch.nn.Module,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        vocabulary: int = 0,
        softcap: float | None = None,
        smoothing: float = 0.0,
    ) -> torch.Tensor:
        if targets is None:
            return project(hidden)
        weight = matrix.weight if is_linear and not matrix.weight.requires_grad else None
        hidden, weight, up = with_lora(head, hidden) or (hidden, weight, None)
        return token_losses(hidden, targets, project, vocabulary, weight, softcap, smoothing, rows_of(head), up)

    return forward


def token_losses(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    project: Callable[[torch.Tensor], torch.Tensor],
    vocabulary: int,
    weight: torch.Tensor | None = None,
    softcap: float | None = None,
    smoothing: float = 0.0,
    trained: Rows | None = None,
    up: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy in nats of each position, [N] fp32: hidden [N, H], targets [N], project(hidden) the logits [N, V].

    weight [V, H]: the output layer's, where it is all of it and not trained. softcap: where the model has one, logits =
    softcap * tanh(logits / softcap). smoothing: the target is (1 - smoothing) at the piece wanted plus
    smoothing / vocabulary everywhere (Szegedy et al. 2015, arXiv 1512.00567). trained: rows that stand in for those of
    `weight`; project knows them itself. up [V, r]: LoRA's beside `weight`, hidden is then as `with_lora` gives it.
    """
    if weight is not None:
        return FrozenHeadLoss.apply(hidden, weight, up, targets, softcap, smoothing, *(trained or (None, None)))
    rows = chunk_rows(vocabulary, hidden.device.type)
    losses = [
        checkpoint(_chunk_losses, part, target, project, softcap, smoothing, use_reentrant=False)
        for part, target in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)


def _chunk_losses(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    project: Callable[[torch.Tensor], torch.Tensor],
    softcap: float | None,
    smoothing: float,
) -> torch.Tensor:
    logits = project(hidden).float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)


def _row_sums(losses: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """[B, 2] fp32 from the losses of the counted positions [N]: each row's sum and count."""
    sums = losses.new_zeros(counted.shape[0]).index_add_(0, counted.nonzero()[:, 0], losses)
    return torch.stack([sums, counted.sum(1).to(sums.dtype)], dim=1)
