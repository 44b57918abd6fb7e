"""Who may look at whom, and which positions a token gets: the rules of ChatGLM's prompts, as tensors.

A row is `[pads] prompt <sop> answer`, its prompt holding [gMASK] (or [MASK]). Notation: B rows, S tokens of this
call, K keys (cached ones included); `context` [B] is the index of the first <sop>, `keep` [B, K] is True at tokens
and False at pads. "Blocked" masks are the original's: bool [B, 1, S, K], True = may NOT attend.
"""

import torch
from torch import LongTensor, Tensor


def first_index(input_ids: LongTensor, token_id: int) -> LongTensor:
    """Index [B] of the first `token_id` in each row, S where there is none."""
    hit = input_ids == token_id
    return torch.where(hit.any(1), hit.int().argmax(1), input_ids.shape[1])


def find_context(input_ids: LongTensor, bos_token_id: int) -> LongTensor:
    """Prompt length [B], pads and [gMASK] included. Raises ValueError if a row has no <sop>."""
    context = first_index(input_ids, bos_token_id)
    _require(context < input_ids.shape[1], f"no <sop> (id {bos_token_id}), so where its answer starts is unknown")
    return context


def find_blank(input_ids: LongTensor, config) -> tuple[LongTensor, Tensor]:
    """Index [B] of the token the answer fills, and whether it is [gMASK], which wins over [MASK].

    Raises ValueError if a row has neither.
    """
    gmask = first_index(input_ids, config.gmask_token_id)
    has_gmask = gmask < input_ids.shape[1]
    blank = torch.where(has_gmask, gmask, first_index(input_ids, config.mask_token_id))
    names = f"[gMASK] (id {config.gmask_token_id}) nor [MASK] (id {config.mask_token_id})"
    _require(blank < input_ids.shape[1], f"neither {names}, so the position of its answer is unknown")
    return blank, has_gmask


def _require(found: Tensor, lack: str):
    if not found.all():
        rows = (~found).nonzero().flatten().tolist()
        raise ValueError(f"row(s) {rows} of input_ids hold {lack}. Build prompts as text + [gMASK] + <sop>")


def position_rows(context: LongTensor, blank: LongTensor, keep: Tensor) -> LongTensor:
    """2-D positions [B, 2, S], counted from the first real token of each row.

    Row 0: 0, 1, 2, ... over the prompt, then the blank's position for every answer token.
    Row 1: 0 over the prompt, then 1, 2, 3, ... starting at <sop>.
    """
    index = torch.arange(keep.shape[1], device=keep.device)
    start = keep.int().argmax(1, keepdim=True)
    in_prompt = index < context[:, None]
    position = torch.where(in_prompt, index, blank[:, None]) - start
    block_position = index - context[:, None] + 1
    return torch.stack([position, block_position], 1).clamp(min=0)


def build_position_ids(input_ids: LongTensor, keep: Tensor | None, config) -> LongTensor:
    """Positions of whole rows: [B, 2, S], or [B, S] with `position_encoding_2d=False`.

    In 1-D mode the answer repeats the position of a [MASK], but goes on counting after a [gMASK].
    """
    keep = torch.ones_like(input_ids, dtype=torch.bool) if keep is None else keep
    blank, has_gmask = find_blank(input_ids, config)
    rows = position_rows(find_context(input_ids, config.bos_token_id), blank, keep)
    if config.position_encoding_2d:
        return rows
    counted = torch.arange(keep.shape[1], device=keep.device) - keep.int().argmax(1, keepdim=True)
    return torch.where(has_gmask[:, None], counted.clamp(min=0), rows[:, 0])


def grow_position_ids(position_ids: LongTensor, new_tokens: int = 1) -> LongTensor:
    """The same positions with those of `new_tokens` generated tokens appended.

    2-D: the position stays, the block position counts on. 1-D: a row goes on as its last two entries do, because
    they tell [gMASK] (counting) from [MASK] (standing still).
    """
    last = position_ids[..., -1:]
    if position_ids.dim() == 3:
        step = torch.tensor([[0], [1]], device=last.device)
    else:
        step = (last - position_ids[..., -2:-1] == 1).long()
    return torch.cat([position_ids, last + step * torch.arange(1, new_tokens + 1, device=last.device)], -1)


def context_from_positions(position_ids: LongTensor) -> LongTensor:
    """Prompt length [B] read off 2-D positions: where the block position leaves 0 (S if it never does)."""
    answer = position_ids[:, 1] > 0
    return torch.where(answer.any(1), answer.int().argmax(1), answer.shape[1])


def build_blocked_mask(context: LongTensor, keep: Tensor, past_length: int = 0) -> Tensor:
    """Blocked mask [B, 1, S, K] for the last S = K - past_length tokens.

    The prompt sees itself in both directions, the answer sees the prompt and its own past, pads neither see nor are
    seen.
    """
    key = torch.arange(keep.shape[1], device=keep.device)
    query = key[past_length:, None]
    future = (key > query) & (key >= context[:, None, None])
    return (future | ~keep[:, None] | ~keep[:, past_length:, None])[:, None]


def keep_from_blocked(blocked: Tensor) -> Tensor:
    """`keep` [B, K] of a blocked mask: a pad is a column that no query may see."""
    return ~blocked[:, 0].all(1)


def move_pads_left(input_ids: LongTensor, keep: Tensor) -> tuple[LongTensor, Tensor]:
    """The same rows and mask [B, S], the pads behind each row's last token moved in front of its first."""
    length = input_ids.shape[1]
    behind = keep.flip(1).int().argmax(1, keepdim=True)
    source = (torch.arange(length, device=keep.device) - behind) % length
    return input_ids.gather(1, source), keep.gather(1, source)
