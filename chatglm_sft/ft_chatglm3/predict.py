"""Talk to the tuned ChatGLM3 in the console; --query for one answer, --output for a file of them, --base: no adapter.

python chatglm_sft/ft_chatglm3/predict.py --model_save_dir out
python chatglm_sft/ft_chatglm3/predict.py --model_save_dir out --data_path questions.jsonl --output answers.jsonl
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if __name__ == "__main__":  # finds common/ from any directory
    sys.path[0] = __file__.rpartition("chatglm_sft")[0] or "."

from chatglm_sft import prompt_chatglm3 as prompt
from chatglm_sft.ft_chatglm3.config import Config
from common.cli import parse
from common.config import PredictFlags
from common.errors import run_main

if TYPE_CHECKING:
    from common.inference.answerer import Answerer
    from common.inference.remote import Remote


def load_answer(cfg: Config, base: bool = False, base_url: str = "", once: bool = False) -> Answerer | Remote:
    """The Answerer of the run in `cfg.model_save_dir`, or of a server; evaluation.py and post_api.py use it too."""
    import chatglm_sft.models.chatglm2  # noqa: F401 -- tells transformers about the model
    from common.inference import remote, tuned

    return remote.load(cfg, prompt, base_url) if base_url else tuned.load(cfg, prompt, base, once)


def main(argv: list[str] | None = None) -> None:
    cfg, flags = parse(Config, PredictFlags, argv)
    import chatglm_sft.models.chatglm2  # noqa: F401 -- tells transformers about the model
    from common.inference import console
    from common.inference.answerer import Sampling
    from common.runs import chosen

    cfg = chosen.choose(cfg, flags)
    if flags.output:
        from common.evaluation import answer_file

        rows = answer_file.rows_to_ask(cfg, flags)
        return answer_file.write(load_answer(cfg, flags.base, flags.base_url), rows, cfg, flags)
    if flags.print_prompt:
        return console.print_prompt(cfg, prompt, flags.print_prompt, flags.system)
    answer = load_answer(cfg, flags.base and not flags.compare, flags.base_url, once=bool(flags.query))
    if flags.query:
        return console.ask_once(answer, Sampling.of(cfg), flags)
    console.chat(answer, Sampling.of(cfg), flags)


if __name__ == "__main__":
    run_main(main)
