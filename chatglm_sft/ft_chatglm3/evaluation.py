"""Score the tuned ChatGLM3 on held-out rows (BLEU-4, ROUGE, chrF of its greedy answers) or on benchmarks.

python chatglm_sft/ft_chatglm3/evaluation.py --model_save_dir out --data_path held_out.jsonl --compare
python chatglm_sft/ft_chatglm3/evaluation.py --tasks ceval,gsm8k --task_dir benchmarks --compare
"""

import sys

if __name__ == "__main__":  # finds common/ from any directory
    sys.path[0] = __file__.rpartition("chatglm_sft")[0] or "."

from chatglm_sft.ft_chatglm3.config import Config
from chatglm_sft.ft_chatglm3.predict import load_answer
from common.cli import parse
from common.config import EvaluationFlags
from common.errors import run_main


def main(argv: list[str] | None = None) -> None:
    cfg, flags = parse(Config, EvaluationFlags, argv)
    from common import distributed
    from common.evaluation import benchmark, evaluate, tasks
    from common.runs import chosen, places

    distributed.join(cfg)
    cfg = chosen.choose(cfg, flags)
    places.check_scoring(cfg)
    base = flags.base and not flags.compare
    if flags.tasks:
        questions = tasks.read(flags)
        benchmark.report(load_answer(cfg, base, flags.base_url), questions, cfg, flags)
    else:
        rows = evaluate.rows_to_score(cfg, flags.limit)
        evaluate.report(load_answer(cfg, base, flags.base_url), rows, cfg, flags)
    distributed.part()


if __name__ == "__main__":
    run_main(main)
