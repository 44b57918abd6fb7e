"""POST /nlg/text_generate: the fields and defaults of the original projects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common.conversation.turns import Turn
from common.inference.answerer import Sampling
from common.serving.failures import RequestRefusedError
from common.serving.validation import Field, read_fields

if TYPE_CHECKING:
    from common.config import SFTConfig

MOST_TOKENS = 4096
FIELDS = {
    "instruction": Field(str, "", about="the question, or what to do with text"),
    "text": Field(str, "", about="put on the next line"),
    "penalty_alpha": Field(float, 1.0, 0, 10, "accepted; contrastive search is gone from transformers"),
    "max_new_tokens": Field(int, 128, 1, MOST_TOKENS, "most tokens of the answer"),
    "temperature": Field(float, 0.8, 0.01, 10, "of sampling"),
    "do_sample": Field(bool, True, about="false: greedy, or beams"),
    "num_beams": Field(int, 1, 1, 8, "beams"),
    "top_p": Field(float, 0.8, 0.01, 1, "nucleus"),
    "top_k": Field(int, 50, 0, 1000, "candidates; 0: all"),
    "min_p": Field(float, 0.0, 0, 1, "candidates below this share of the highest chance are left out; 0: none"),
}


def fields_of(cfg: SFTConfig) -> dict[str, Field]:
    """FIELDS, an operator's --max_new_tokens being the default of its field."""
    if "max_new_tokens" not in cfg.given:
        return FIELDS
    tokens = cfg.max_new_tokens
    return FIELDS | {"max_new_tokens": FIELDS["max_new_tokens"]._replace(default=tokens, most=max(tokens, MOST_TOKENS))}


def read_request(
    body: dict[str, Any], fields: dict[str, Field], repetition_penalty: float
) -> tuple[list[Turn], Sampling]:
    """The question and the Sampling in a body; RequestRefusedError names the field and what is allowed.

    fields: those of `fields_of`. repetition_penalty: the service's, for which there is no field.
    """
    given = read_fields(body, fields)
    question = "\n".join(part for part in (given.pop("instruction"), given.pop("text")) if part.strip())
    if not question:
        raise RequestRefusedError("instruction 和 text 都是空的 are both empty", param="instruction", code="empty")
    if given.pop("penalty_alpha") and "penalty_alpha" in body and not given["do_sample"] and given["num_beams"] == 1:
        raise RequestRefusedError(
            "penalty_alpha: 对比搜索已不支持 contrastive search is gone from transformers; send 0, or do_sample true",
            param="penalty_alpha",
            code="unsupported_value",
        )
    return [Turn("user", question)], Sampling(**given, repetition_penalty=repetition_penalty)
