"""Evaluation's answers one by one against batches, greedy, 64 new tokens; and how long the recipes take to start.

python benchmarks/generate.py                                        # all families; train.py's default run comes first
python benchmarks/generate.py --family gemma --model_save_dir out    # the finished run in `out`
"""

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from measure import ROOT, machine, run, table

FAMILIES = {"gemma": "gemma_sft.ft_gemma", "qwen": "qwen2_sft.ft_qwen2", "chatglm": "chatglm_sft.ft_chatglm"}
BATCHES = (32, 64, 128)
NEW_TOKENS = 64


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, help="one of the families")
    parser.add_argument("--model_save_dir", default="", help="a finished run; without it train.py makes one")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3, help="times each run is made, in turn")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="rows answered together")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(answer_all(args)))
        return
    print(machine())
    for family in [args.family] if args.family else FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            compare(family, args.model_save_dir or trained(family, folder), args)
        show_start(family)


def trained(family, folder):
    """`folder` with the family's default run in it."""
    recipe = ROOT / FAMILIES[family].replace(".", "/") / "train.py"
    run([recipe, "--model_save_dir", folder, "--eval_rows", 0])
    return folder


def compare(family, folder, args):
    """Print the table of one family: seconds of every batch size, the ratio, and whether the answers are the same."""
    found = {size: [] for size in (1, *args.batches)}
    for _ in range(args.rounds):
        for size, results in found.items():
            command = [Path(__file__), "--one", size, "--family", family, "--prompts", args.prompts]
            results.append(run([*command, "--model_save_dir", folder])[0])
            shown = {key: value for key, value in results[-1].items() if key != "answers"}
            print(f"{family}, {size} together: {shown}", file=sys.stderr, flush=True)
    alone, rows = statistics.median(result["seconds"] for result in found[1]), []
    for size, results in found.items():
        seconds = statistics.median(result["seconds"] for result in results)
        same = sum(a == b for a, b in zip(results[0]["answers"], found[1][0]["answers"], strict=True))
        rows.append([size, f"{seconds:.1f}", f"{results[0]['tokens'] / seconds:.0f}", f"{alone / seconds:.1f}"])
        rows[-1] += [f"{same} / {args.prompts}", f"{results[0]['idle']:.0%}"]
    print(f"\n{family}: {args.prompts} prompts, {NEW_TOKENS} new tokens, median of {args.rounds}\n")
    print(table(["together", "seconds", "tokens/s", "speed", "same answers", "steps of rows that had ended"], rows))


def answer_all(args):
    """What a fresh process does: {seconds, tokens, idle, answers in the order of the rows}."""
    package = FAMILIES[args.family]
    recipe, config = (importlib.import_module(f"{package}.{name}") for name in ("predict", "config"))
    data = (str(ROOT / "data/product_heldout.jsonl"), str(ROOT / "data/entity_heldout.jsonl"))
    cfg = config.Config(model_save_dir=args.model_save_dir, eval_data_path=data, **config.Config.EMBEDDED)
    answer = recipe.load_answer(cfg)
    from common.evaluation import asking
    from common.inference.answerer import Sampling

    rows = asking.held_out(cfg, data, args.prompts)[0]
    questions = [turns[:-1] for _, turns in rows]
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    answer(questions[:1], sampling)
    order = sorted(range(len(questions)), key=lambda number: sum(len(turn.text) for turn in questions[number]))
    found, idle, steps = {}, 0, 0
    started = time.perf_counter()
    for start in range(0, len(order), args.one):
        batch = order[start : start + args.one]
        answers = answer([questions[number] for number in batch], sampling)
        found |= dict(zip(batch, answers, strict=True))
        longest = max(one.tokens for one in answers)
        idle += sum(longest - one.tokens for one in answers)
        steps += longest * len(answers)
    return {
        "seconds": time.perf_counter() - started,
        "tokens": sum(one.tokens for one in found.values()),
        "idle": idle / max(steps, 1),
        "answers": [found[number].text for number in range(len(rows))],
    }


def show_start(family, times=3):
    """Print how long `--help` and the first token of `predict.py --query` take, fresh processes each."""
    folder = ROOT / FAMILIES[family].replace(".", "/")
    query = ["--base", "--query", "类型#裙", "--max_new_tokens", 1]
    for title, command in (("--help", ["--help"]), ("first token of --query", query)):
        seconds = statistics.median(run([folder / "predict.py", *command])[1] for _ in range(times))
        print(f"{family}, predict.py {title}: {seconds:.2f} s")


if __name__ == "__main__":
    main()
