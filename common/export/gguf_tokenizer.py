"""A tokenizer as llama.cpp reads one from a GGUF file, read off the tokenizer's own rules.

Two kinds are known: pieces with bytes as the last resort (its "llama", SentencePiece's BPE), and byte-level BPE (its
"gpt2") whose words are split by a pattern that llama.cpp has by a name. Source: src/llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from gguf import TokenType

from common.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

BYTE = re.compile("<0x[0-9A-F]{2}>")
SPACE = "▁"  # how SentencePiece writes a blank
ADDED_SCORE = -1000.0
Pre = Mapping[tuple[str, bool], str]  # {(pattern that splits words, ignore_merges): what llama.cpp calls both}


class Vocabulary(NamedTuple):
    """What is written of a tokenizer: pieces and their types by id, and how they are merged."""

    kind: str  # llama.cpp's name: llama or gpt2
    pre: str  # its name of the pattern that splits words
    tokens: list[str]
    types: list[int]
    scores: list[float]  # of kind llama
    merges: list[str]  # of kind gpt2


def read(tokenizer: PreTrainedTokenizerBase, rows: int, names: Pre, where: str) -> Vocabulary:
    """The Vocabulary of a tokenizer, filled up to the `rows` of the embedding.

    where: the base, for errors. UserError where llama.cpp would split or merge otherwise.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    model = rules.get("model", {})
    if model.get("type") != "BPE":
        _refuse(where, f"model {model.get('type')}")
    merges = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"]]
    tokens, types = _pieces(model["vocab"], rules["added_tokens"], rows, model.get("unk_token"))
    if model.get("byte_fallback"):
        _check_blanks(rules, where)
        return Vocabulary("llama", "default", tokens, types, _scores(tokens, types, merges, where), [])
    pre = names.get((_pattern(rules), bool(model.get("ignore_merges"))))
    if pre is None:
        _refuse(where, f"pre_tokenizer {json.dumps(rules.get('pre_tokenizer'), ensure_ascii=False)[:200]}")
    return Vocabulary("gpt2", str(pre), tokens, types, [], [" ".join(pair) for pair in merges])


def add(writer: GGUFWriter, words: Vocabulary, tokenizer: PreTrainedTokenizerBase, stops: list[int], bos: bool) -> None:
    """Write a Vocabulary. stops: ids that end an answer, the trained one first. bos: whether prompts begin with bos."""
    writer.add_tokenizer_model(words.kind)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.kind == "llama":
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(False)
    writer.add_token_merges(words.merges)
    own = tokenizer.eos_token_id if tokenizer.eos_token_id in stops else stops[0]
    others = [stop for stop in stops if stop != own]
    writer.add_eos_token_id(own)
    for add_stop, stop in zip((writer.add_eot_token_id, writer.add_eom_token_id), others or [own], strict=False):
        add_stop(stop)
    for add_id, id_ in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if id_ is not None:
            add_id(id_)
    writer.add_add_bos_token(bos)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _pieces(
    vocab: dict[str, int], added: list[dict[str, Any]], rows: int, unknown: str | None
) -> tuple[list[str], list[int]]:
    """(pieces, their types) by id; rows of the embedding that no piece has are unused ones."""
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [int(TokenType.UNUSED)] * rows
    for token, number in vocab.items():
        tokens[number] = token
        types[number] = int(TokenType.BYTE if BYTE.fullmatch(token) else TokenType.NORMAL)
    for one in added:
        number, text = one["id"], one["content"]
        if number >= rows or (SPACE in text and not one["normalized"]):  # never found in a text: its blanks are blanks
            continue
        tokens[number] = text if one["special"] else text.replace(SPACE, " ")
        types[number] = int(TokenType.CONTROL if one["special"] else TokenType.USER_DEFINED)
    if unknown in vocab:
        types[vocab[unknown]] = int(TokenType.UNKNOWN)
    return tokens, types


def _scores(tokens: list[str], types: list[int], merges: list[list[str]], where: str) -> list[float]:
    """Scores that make SentencePiece merge in the order of `merges`: it merges what scores most, whatever its parts."""
    ranks: dict[str, int] = {}
    last = ""
    for rank, pair in enumerate(merges):
        merged = "".join(pair)
        if merged in ranks and merged != last:
            _refuse(where, f"merges of {merged!r}")
        ranks.setdefault(merged, rank)
        last = merged
    scores = []
    for token, kind in zip(tokens, types, strict=True):
        if kind == TokenType.NORMAL and len(token) > 1 and token not in ranks:
            _refuse(where, f"piece {token!r}, which no merge makes")
        made = kind in (TokenType.NORMAL, TokenType.BYTE)
        scores.append(-float(ranks.get(token, len(merges))) if made else ADDED_SCORE)
    return scores


def _check_blanks(rules: dict[str, Any], where: str) -> None:
    """UserError unless the tokenizer does no more to a text than write its blanks as SPACE."""
    if rules.get("normalizer") != {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}:
        _refuse(where, f"normalizer {rules.get('normalizer')}")
    pre = rules.get("pre_tokenizer")  # after that normalizer a split at blanks splits nothing
    if pre and not (pre["type"] == "Split" and pre["pattern"] == {"String": " "}):
        _refuse(where, f"pre_tokenizer {pre}")


def _pattern(rules: dict[str, Any]) -> str:
    """The pattern that splits words before a byte-level BPE, "" where it is not split so."""
    parts = (rules.get("pre_tokenizer") or {}).get("pretokenizers") or []
    kinds = [part["type"] for part in parts]
    if kinds != ["Split", "ByteLevel"] or parts[1].get("add_prefix_space") or parts[1].get("use_regex"):
        return ""
    return parts[0]["pattern"].get("Regex", "") if parts[0]["behavior"] == "Isolated" else ""


def _refuse(where: str, what: str) -> None:
    raise UserError(
        f"{where}: llama.cpp 没有这样的分词器 llama.cpp has no such tokenizer: {what}; "
        "export as safetensors, without --format"
    )
