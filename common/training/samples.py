"""A few validation rows, answered at each validation: whether answers end by then, and what they are like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from common import files, launch
from common.config import LORA
from common.device import device, resolve_dtype
from common.errors import UserError
from common.evaluation import metrics, records
from common.evaluation.evaluate import HeldOut, some_of_validation
from common.inference.answerer import Answerer, Sampling
from common.model.frozen_layers import widened
from common.model.layers import causal_of
from common.model.loading import context_of

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )

    from common.config import SFTConfig
    from common.conversation.family import Family
    from common.data.dataset import TrainingData
    from common.runs.run import Run

NAME = "samples.jsonl"
KEPT = "where question reference answer reasoning_content tool_calls stop tokens".split()  # of a record of evaluation
MANY = 32  # rows answered at once, at most


class Samples(TrainerCallback):
    """Answers `rows` (file:line and turns, the last of them the reference) with the net as it is, and keeps them.

    Greedy, so that nothing is drawn from a generator of random numbers: a run learns the same with and without.
    Of several processes all answer, as a net in parts needs it, and the first one writes.
    """

    def __init__(
        self,
        net: PreTrainedModel | PeftModel,
        rows: HeldOut,
        cfg: SFTConfig,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Family,
        folder: Path,
    ) -> None:
        self.net = net
        self.rows = rows
        self.asked = (tokenizer, prompt, cfg.prompt_style, cfg.max_length_q, None, context_of(cfg.base))
        self.sampling = Sampling.of(cfg, do_sample=False, num_beams=1)
        self.path = folder / NAME
        self.dtype = resolve_dtype(cfg.dtype)  # of the base; what is trained is fp32, and autocast as in a step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep what was answered up to the step resumed from; what came after it is made again."""
        if state.is_world_process_zero:
            kept = [line for line in _lines(self.path) if line["step"] <= state.global_step]
            files.write_jsonl(self.path, kept)

    def take(self, step: int) -> dict[str, float]:
        """Append the answers of `step` to samples.jsonl; {stopped, looping}: the shares of them that do.

        The net must be in evaluation mode.
        """
        with widened(self.net), torch.autocast(device().type, self.dtype, enabled=self.dtype != torch.float32):
            lines = [line for start in range(0, len(self.rows), MANY) for line in self._answer(step, start)]
        if not launch.rank():
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.writelines(map(files.line_of, lines))
        return {name: sum(line[name] for line in lines) / len(lines) for name in ("stopped", "looping")}

    def _answer(self, step: int, start: int) -> list[dict[str, Any]]:
        """The lines of MANY rows from `start` on."""
        causal = causal_of(self.net)
        own = causal.generation_config  # an Answerer empties it, and a checkpoint of a whole model has it
        try:
            batch = [(start + number, *row) for number, row in enumerate(self.rows[start : start + MANY])]
            answer = Answerer(self.net, *self.asked)
            found = list(records.predict(answer, batch, self.sampling, base=False, score=_score))
        finally:
            causal.generation_config = own
        shares = ("stopped", "looping")
        return [
            {"step": step, **{name: record[name] for name in KEPT if name in record}}
            | {name: bool(record["scores"].get(name)) for name in shares}  # one not asked has no scores but 0
            for record in found
        ]


def of(
    net: PreTrainedModel | PeftModel,
    rows: TrainingData,
    cfg: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Family,
    folder: Path,
) -> Samples | None:
    """The Samples of `cfg.sample_rows` of the validation rows; None where none are wanted, or nothing is validated.

    UserError where they were asked for by name and there is no validation row.
    """
    if cfg.sample_rows and "sample_rows" in cfg.given and not len(rows.validation):
        raise UserError("--sample_rows 需要验证数据 needs validation rows: --val_set_size above 0")
    chosen = some_of_validation(cfg, rows, cfg.sample_rows)
    return Samples(net, chosen, cfg, tokenizer, prompt, folder) if chosen else None


def conclude(work: Run, results: dict[str, Any], cfg: SFTConfig) -> None:
    """Print in one line that answers of what was saved do not stop, or loop, and what helps; nothing where all end.

    results: what `fit` returned.
    """
    if launch.rank():
        return
    lines = [line for line in _lines(work.folder / NAME) if line["step"] == results.get("adapter_of_step")]
    endless = [line for line in lines if line["stop"] == "length"]
    looping = [line for line in endless if line["looping"]]
    records.show_unanswered(lines)
    if endless:
        print(
            f"回答不停止 answers do not stop: {len(endless)} / {len(lines)} within --max_new_tokens "
            f"{cfg.max_new_tokens}, {len(looping)} of them 重复 repeat themselves (samples.jsonl); 可试 what helps: "
            f"{_remedy(cfg, looping)}"
        )


def _score(prediction: str, reference: str, question: str) -> dict[str, Any]:
    return {"looping": metrics.loops(prediction)}


def _remedy(cfg: SFTConfig, looping: list[dict[str, Any]]) -> str:
    longer = "更多轮次或数据 more --epochs or rows"
    if looping:
        answering = "; 回答时 when answering: --repetition_penalty 1.05" if cfg.repetition_penalty == 1 else ""
        return f"{longer}, a higher --learning_rate{answering}"
    more = f"a --max_new_tokens above the longest reference, {longer}"
    return more if cfg.tuning not in LORA else f"{more}, --train_template_tokens true"


def _lines(path: Path) -> list[dict[str, Any]]:
    return files.read_jsonl(path) if path.exists() else []
