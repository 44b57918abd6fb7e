"""How a run answers, and whether another model answers the same: logits and greedy ids of some prompts, in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import GenerationConfig

from common.conversation.turns import Turn
from common.errors import UserError
from common.evaluation import evaluate
from common.inference.answerer import fitted
from common.inference.tuned import open_run
from common.model.adapter import load_tuned, merge_reasons
from common.model.layers import causal_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.config import SFTConfig
    from common.conversation.family import Family

# largest difference of a logit, as a share of the largest logit: fp32 rounds sums only, the others each weight too
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.int8: 5e-2}
NEW_TOKENS, QUESTIONS = 32, 8
FALLBACK = (
    "你好",
    "1+1=",
    "请介绍一下你自己。",
    "类型#裙*颜色#黑色",
    "写一句诗。",
    "Hello!",
    "天为什么是蓝的？",
    "再见",
)


class Tuned(NamedTuple):
    """A run's model in fp32, adapter and all, with what else an export needs."""

    net: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    manifest: dict[str, Any]
    questions: list[Sequence[Turn]]  # conversations the export is proven on
    prompts: list[list[int]]  # ids of each of them, as a prompt
    stop_ids: list[int]
    max_length_q: int  # to which prompts were cut
    rank: int  # of the adapter; 0 where the run tuned the weights themselves
    merge_reasons: list[str]  # why the adapter alone cannot be served, see adapter.merge_reasons

    @property
    def penalty(self) -> float:
        """The run's own repetition penalty, 1 for none."""
        return self.manifest["config"].get("repetition_penalty", 1.0)


class Expected(NamedTuple):
    """How the run answers: for each prompt the greedy ids, and the fp32 logits [ids + 1, vocabulary] they came from."""

    tuned: Tuned
    answers: list[list[int]]
    logits: list[torch.Tensor]


def load(cfg: SFTConfig, prompt: Family) -> Tuned:
    """The Tuned of the finished run in `cfg.model_save_dir`, on the unquantised base; errors as in tuned.open_run."""
    manifest, trained, tokenizer = open_run(cfg, prompt)
    manifest["config"] = manifest["config"] | {"model_save_dir": cfg.model_save_dir}  # it may have been moved
    if trained.bits:
        print("合并到未量化的基座 merging into the unquantised base: not bit for bit what the adapter was trained on")
    say("加载 loading: 训练后的模型 the tuned model, in float32")
    net = load_tuned(trained._replace(bits=0), cfg.model_save_dir, "float32")
    adapter = getattr(net, "peft_config", {}).get("default")
    causal_of(net).generation_config = GenerationConfig()  # the checkpoint's own would mix with ours
    turns = _questions(cfg, manifest)
    style, limit = trained.prompt_style, trained.max_length_q
    prompts = [fitted(tokenizer, prompt, asked, style, limit)[0] for asked in turns]
    rank, reasons = (adapter.r, merge_reasons(net)) if adapter else (0, [])
    return Tuned(net, tokenizer, manifest, turns, prompts, manifest["stop_ids"], limit, rank, reasons)


def measure(tuned: Tuned) -> Expected:
    """The Expected answers and logits of a run, which the exported model has to repeat."""
    say(f"回答 answering: {len(tuned.prompts)} 个提示 prompts, to compare with")
    answers = [greedy(tuned.net, tuned, ids) for ids in tuned.prompts]
    logits = [logits_of(tuned.net, ids, new) for ids, new in zip(tuned.prompts, answers, strict=True)]
    return Expected(tuned, answers, logits)


def check_merge(whole: PreTrainedModel, expected: Expected) -> None:
    """UserError where the merged fp32 model answers otherwise than base and adapter."""
    say("比较 comparing: 合并后的模型 the merged model, in float32")
    print(f"合并 merged: {compare(whole, expected, torch.float32)}")


def compare(net: PreTrainedModel, expected: Expected, dtype: torch.dtype) -> str:
    """How far `net`, in `dtype`, is from the run's logits and greedy answers, as text; UserError beyond TOLERANCE.

    A greedy answer may leave the run's only at a step whose two best ids are within that tolerance of each other.
    """
    tuned = expected.tuned
    largest, scale = 0.0, 0.0  # difference of a logit, and logit
    same = 0  # greedy answers
    for ids, new, logits in zip(tuned.prompts, expected.answers, expected.logits, strict=True):
        limit = TOLERANCE[dtype] * float(logits.abs().max())
        difference = float((logits_of(net, ids, new) - logits).abs().max())
        if not difference <= limit:  # NaN is not
            raise UserError(
                f"导出的模型与训练的不同 the exported model differs: a logit by {difference:.3g}, "
                f"more than {limit:.3g} ({dtype}); nothing was written; try --dtype float32 (GGUF: --gguf_type f32)"
            )
        largest, scale = max(largest, difference), max(scale, float(logits.abs().max()))
        same += same_answer(greedy(net, tuned, ids), new, logits, limit)
    return (
        f"最大 logit 差 largest logit difference {largest:.2g} of {scale:.3g} (tolerance {TOLERANCE[dtype]:g} of it), "
        f"贪心回答一致 greedy answers equal {same}/{len(expected.answers)}"
    )


def same_answer(found: Sequence[int], new: Sequence[int], logits: torch.Tensor, limit: float) -> bool:
    """Whether the ids are equal; UserError where they part at a step that was not a tie."""
    if found == new:
        return True
    step = next(n for n, pair in enumerate(zip([*found, None], [*new, None], strict=False)) if pair[0] != pair[1])
    if step < len(found) and float(logits[step].max() - logits[step][found[step]]) <= limit:
        return False
    raise UserError(
        f"导出的模型回答不同 the exported model's greedy answer differs from token {step + 1} on: "
        f"{found[step : step + 8]}, not {new[step : step + 8]}"
    )


def say(stage: str) -> None:
    """Print what comes next, at once: with a large model it takes minutes."""
    print(stage, flush=True)


def _questions(cfg: SFTConfig, manifest: dict[str, Any]) -> list[Sequence[Turn]]:
    """Conversations to prove the export on: the run's held-out rows as far as they can be read, then fixed ones."""
    try:
        rows = evaluate.rows_to_score(cfg, QUESTIONS)
    except UserError:
        rows = []
    fixed = [[Turn("user", text)] for text in FALLBACK]
    return [*(turns[:-1] for _, turns in rows), *fixed][:QUESTIONS]


def greedy(net: PreTrainedModel | PeftModel, tuned: Tuned, ids: list[int]) -> list[int]:
    """The ids `net` answers a prompt with, greedily, NEW_TOKENS at most."""
    asked = torch.tensor([ids], device=net.device)
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=tuned.stop_ids, pad_token_id=0)
    with torch.inference_mode():
        output = net.generate(input_ids=asked, attention_mask=torch.ones_like(asked), generation_config=config)
    return output[0, len(ids) :].tolist()


def logits_of(net: PreTrainedModel | PeftModel, ids: list[int], new: list[int]) -> torch.Tensor:
    """fp32 logits [len(new) + 1, vocabulary] from the prompt's last id on, `new` fed as the answer."""
    with torch.inference_mode():
        output = net(input_ids=torch.tensor([[*ids, *new]], device=net.device), logits_to_keep=len(new) + 1)
    return output.logits[0].float().cpu()
