"""Control tokens of a template that a base can hardly tell apart from others: found before it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from common import distributed
from common.config import LORA
from common.conversation.turns import Turn
from common.data import dataset
from common.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.config import SFTConfig
    from common.conversation.family import Family
    from common.data.dataset import TrainingData

# cosine: a pretrained base whose end of an answer had a neighbour at 0.995 went on after its answers, tuned briefly;
# a base tuned on its template, the end at 0.944, ended them (docs/methods.md has the measurements)
ALIKE = 0.95
CHUNK = 8192  # rows of the vocabulary in fp32 at once
ONE_OF_EACH = [Turn("system", "?"), *[Turn("user", "?"), Turn("assistant", "!")] * 2]


def to_train(
    base: PreTrainedModel,
    cfg: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Family,
    rows: TrainingData,
    parent: Path | None = None,
) -> list[int]:
    """Ids of the control tokens whose rows of embedding and head are to be trained too; one line says which and why.

    auto: those with a neighbour of cosine ALIKE or more in the output matrix. A base that has not learnt its template
    has left their rows where all unused ones are: an adapter below the head then has to tell thousands of rows apart
    by the hidden state alone, and the end of an answer is the last thing it learns. So it is with the marks of calls
    and thoughts in the answers of `rows`. true: all of the template's besides. An adapter in `parent` that is trained
    on has its own rows, and gets no others. UserError where rows are asked for and cannot be trained.
    """
    if cfg.train_template_tokens == "false" or cfg.tuning == "full" or parent:
        return []
    why_not = _why_not(base, cfg)
    if why_not and cfg.train_template_tokens == "true":
        raise UserError(f"--train_template_tokens true: {why_not}; leave it out")
    if distributed.shards_weights():
        print(f"控制符 control tokens: 没有测量 not measured, their rows are not trained: {why_not}")
        return []
    around = set(control_ids(tokenizer, prompt, cfg.prompt_style))
    cosines = nearest(base.get_output_embeddings().weight, sorted(around | taught_ids(tokenizer, rows)))
    asked = around if cfg.train_template_tokens == "true" else set()
    chosen = [id_ for id_, cosine in cosines.items() if id_ in asked or cosine >= ALIKE]
    if chosen:
        told = ", ".join(f"{tokenizer.convert_ids_to_tokens(id_)} {cosines[id_]:.3f}" for id_ in chosen)
        doing = f"不训练 their rows are not trained: {why_not}" if why_not else "也训练 their rows are trained too"
        print(f"控制符与最近一行的余弦 control tokens, cosine to the nearest other row: {told}; {doing}")
    return [] if why_not else chosen


def control_ids(tokenizer: PreTrainedTokenizerBase, prompt: Family, style: str) -> list[int]:
    """Ids of the special or added tokens that the template of a style puts around texts, sorted."""
    pieces = prompt.render(tokenizer, ONE_OF_EACH, style)
    return sorted(_special_ids(tokenizer).intersection(id_ for piece in pieces for id_ in piece.ids))


def taught_ids(tokenizer: PreTrainedTokenizerBase, rows: TrainingData) -> set[int]:
    """Ids of the special or added tokens in the answers of the rows: of calls, of thoughts, and the end."""
    written = [id_ for id_ in _special_ids(tokenizer) if not tokenizer.convert_ids_to_tokens(id_).isspace()]
    return dataset.taught(rows.train, written)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def nearest(matrix: torch.Tensor, ids: Sequence[int]) -> dict[int, float]:
    """{id: largest cosine of its row with another one} of matrix [V, H], in fp32; 1.0 of a row of zeros."""
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(matrix[ids].float(), dim=1)
        found = [torch.nn.functional.normalize(part.float(), dim=1) @ wanted.T for part in matrix.split(CHUNK)]
        cosines = torch.cat(found)  # [V, K]
    cosines[ids, range(len(ids))] = -1.0
    cosines[:, ~wanted.any(dim=1)] = 1.0
    return dict(zip(ids, cosines.amax(dim=0).clamp(max=1.0).tolist(), strict=True))


def _why_not(base: PreTrainedModel, cfg: SFTConfig) -> str:
    """Why single rows cannot be trained, or ""."""
    if cfg.tuning not in LORA:
        return f"--tuning {cfg.tuning} 不训练嵌入和输出层 trains neither embeddings nor head; --tuning lora does"
    if distributed.shards_weights():
        return "FSDP2 与 ZeRO-3 拆开了矩阵 FSDP2 and ZeRO-3 split the matrix"
    ends = {"all-embedding", *(name.rpartition(".")[2] for name in _ends(base))}
    words = [word for word in (*cfg.target_modules, *cfg.modules_to_save) if word.rpartition(".")[2] in ends]
    return f"{' '.join(words)} 已整个训练 is trained or adapted as a whole" if words else ""


def rows_to_train(base: PreTrainedModel, ids: Sequence[int]) -> dict[str, list[int]] | None:
    """peft's trainable_token_indices for these ids, None for none; of a head that is tied it finds the rows itself."""
    embedding, head = _ends(base)
    ends = [embedding] if base.config.tie_word_embeddings else [embedding, head]
    return {name: list(ids) for name in ends} if ids else None


def _ends(base: PreTrainedModel) -> tuple[str, str]:
    """Names of embedding and head in `base`."""
    names = {module: name for name, module in base.named_modules()}
    return names[base.get_input_embeddings()], names[base.get_output_embeddings()]
