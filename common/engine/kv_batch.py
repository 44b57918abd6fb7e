"""Rows that share forward passes: a left-padded batch over the model's own forward and cache; rows join and leave.

A model whose positions or masks are its own says so by three attributes: `prompt_positions(input_ids, attention_mask)`
(of whole prompts, [B, …, S]), `next_positions(position_ids)` (those of one more id, [B, …, 1], from the last two) and
`whole_prompts` (true where a prompt must be read in one call).
"""

import torch
from torch.nn.functional import pad
from transformers import DynamicCache


def prompt_positions(input_ids, attention_mask):
    """Positions [B, S] of left-padded prompts: 0, 1, 2, … from the first token."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def next_positions(position_ids):
    """Positions [B, 1] after the last of [B, S]."""
    return position_ids[:, -1:] + 1


class Rows:
    """B rows under way. `owners` are theirs, in order; every tensor is padded on the left to K columns."""

    def __init__(self, net, owners, prompts, pad_id):
        """Rows of prompts (lists of ids) that have not been read yet; see `read`."""
        width = max(map(len, prompts))
        self.net, self.owners, self.at = net, list(owners), 0
        self.ids = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompts], device=net.device)
        self.mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=net.device)
        self.positions = getattr(net, "prompt_positions", prompt_positions)(self.ids, self.mask)
        self.cache = DynamicCache()  # without the config: every layer keeps all keys, so that rows can be padded

    def read(self, most):
        """Read at most `most` columns of the prompts: the logits [B, V] after the last one, or None before the end."""
        columns = self.ids.shape[1]
        end = columns if getattr(self.net, "whole_prompts", False) else min(columns, self.at + most)
        logits = self._forward(self.ids[:, self.at : end], self.mask[:, :end], self.positions[..., self.at : end])
        self.at = end
        if end < columns:
            return None
        last = self.positions[..., -2:]
        self.positions = last if columns > 1 else torch.cat([last, last], -1)
        return logits

    def step(self, ids):
        """Append one id to each row (a list of B): the logits [B, V] after it."""
        ids = torch.tensor(ids, device=self.mask.device)[:, None]
        self.mask = pad(self.mask, (0, 1), value=1)
        new = getattr(self.net, "next_positions", next_positions)(self.positions)
        self.positions = torch.cat([self.positions, new], -1)[..., -2:]
        return self._forward(ids, self.mask, new)

    def _forward(self, ids, mask, positions):
        output = self.net(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def join(self, other):
        """Take in the rows of `other`, whose prompts have been read; both are padded to the wider one."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        self._widen(width)
        other._widen(width)
        self.owners += other.owners
        self.mask = torch.cat([self.mask, other.mask])
        self.positions = torch.cat([self.positions, other.positions])
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys, mine.values = torch.cat([mine.keys, theirs.keys]), torch.cat([mine.values, theirs.values])

    def keep(self, numbers):
        """Let go of all rows but these; columns that only they had go as well."""
        self.owners = [self.owners[number] for number in numbers]
        index = torch.tensor(numbers, device=self.mask.device)
        first = int(self.mask[index].any(0).int().argmax())
        self.mask, self.positions = self.mask[index, first:], self.positions[index]
        for layer in self.cache.layers:
            rows = index.to(layer.keys.device)
            layer.keys, layer.values = layer.keys[rows, :, first:], layer.values[rows, :, first:]

    def _widen(self, width):
        missing = width - self.mask.shape[1]
        if missing:
            self.mask = pad(self.mask, (missing, 0))
            for layer in self.cache.layers:
                layer.keys, layer.values = (pad(layer.keys, (0, 0, missing, 0)), pad(layer.values, (0, 0, missing, 0)))
