"""A family's recipes, run in this process on its small random base."""

import importlib
import json

import pytest
import torch

from common.cli import parse
from common.config import PredictFlags
from common.conversation.turns import Turn
from common.runs import chosen
from common.training import callbacks

FAMILIES = {
    "gemma": ("gemma_sft.ft_gemma", "small_gemma"),
    "qwen": ("qwen2_sft.ft_qwen2", "small_qwen"),
    "chatglm": ("chatglm_sft.ft_chatglm", "small_chatglm"),
}
STEPS = ["--max_steps", 4, "--save_steps", 1, "--logging_steps", 1, "--save_total_limit", 4]
QUESTION = [Turn("user", "1+1")]


class Family:
    """A family's recipes on its small random base, into folders of their own."""

    def __init__(self, package, base, parent):
        self.package, self.base, self.parent = package, base, parent
        self.given = ["--cache_dir", parent / "cache", "--eval_rows", 0, "--sample_rows", 0, "--learning_rate", 0.05]
        for name, first in (("rows", 0), ("other", 100)):
            rows = [{"query": f"{n}+{n * 7 % 50}", "response": str(n + n * 7 % 50)} for n in range(first, first + 24)]
            (parent / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(self, name):
        return importlib.import_module(f"{self.package}.{name}")

    def flags(self, name, *more, data="rows"):
        given = ["--path_model_pretrain", self.base, "--data_path", self.parent / f"{data}.jsonl", *self.given]
        return [str(flag) for flag in [*given, "--model_save_dir", self.parent / name, *more]]

    def train(self, name, *more, data="rows"):
        self.recipe("train").main(self.flags(name, *more, data=data))
        return self.parent / name

    def stop(self, name, step, *more, data="rows"):
        """Train until the checkpoint of `step` is there, as a run that is killed then leaves it."""

        def die(self, args, state, control, **kwargs):
            saved(self, args, state, control, **kwargs)
            if state.global_step == step:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            saved = callbacks.WholeCheckpoints.on_save
            patch.setattr(callbacks.WholeCheckpoints, "on_save", die)
            self.train(name, *more, data=data)
        return self.parent / name

    def parse(self, flags_class, *flags):
        return parse(self.recipe("config").Config, flags_class, [str(flag) for flag in flags])

    def logits(self, folder, *flags):
        """Of a short question, as predict.py with these flags would ask it."""
        given = ["--model_save_dir", folder, "--dtype", "float32", *flags]
        cfg = chosen.choose(*self.parse(PredictFlags, *given))
        answer = self.recipe("predict").load_answer(cfg)
        with torch.inference_mode():
            return answer.net(torch.tensor([answer.fitted_ids(QUESTION)])).logits

    @property
    def prompt(self):
        return importlib.import_module(f"{self.package.partition('.')[0]}.prompt")
