"""Score the tuned Qwen on held-out rows: BLEU-4 and ROUGE of its greedy answers.

python qwen2_sft/ft_qwen2/evaluation.py --model_save_dir out --data_path held_out.jsonl --compare
"""

import sys

if __name__ == "__main__":  # finds common/ from any directory
    sys.path[0] = __file__.rpartition("qwen2_sft")[0] or "."

from common.config import EvaluationFlags, parse
from common.errors import run_main
from qwen2_sft.ft_qwen2.config import Config
from qwen2_sft.ft_qwen2.predict import load_answer


def main(argv=None):
    cfg, flags = parse(Config, EvaluationFlags, argv)
    from common import evaluate

    rows = evaluate.rows_to_score(cfg, flags.limit)
    answer = load_answer(cfg, flags.base and not flags.compare, flags.base_url)
    evaluate.report(answer, rows, cfg, flags)


if __name__ == "__main__":
    run_main(main)
