"""CPU seconds until the first token of predict.py and the first step of train.py, beside transformers alone.

python benchmarks/start.py                            # three rounds
python benchmarks/start.py --rounds 1 --family qwen
"""

import argparse
import importlib
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

FAMILIES = {"gemma": "gemma_sft.ft_gemma", "qwen": "qwen2_sft.ft_qwen2"}
QUERY = ["--query", "类型#裙*颜色#白色", "--max_new_tokens", "1"]
ONE_STEP = ["--max_steps", "1", "--eval_rows", "0", "--resume", "never", "--cache_dir"]
BARE = "transformers alone, one token"
# (recipe, its flags, the run's folder or cache comes last); what is made by one is there for those after it
RUNS = {
    BARE: ("", []),
    "train.py, nothing tokenised": ("train", [*ONE_STEP, "new"]),
    "train.py, second start": ("train", [*ONE_STEP, "cache"]),
    "predict.py --base": ("predict", ["--base", *QUERY]),
    "predict.py, an adapter": ("predict", QUERY),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="gemma")
    parser.add_argument("--rounds", type=int, default=3, help="times each run is made, in turn")
    parser.add_argument("--one", choices=RUNS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one == BARE:
        one_token(FAMILIES[args.family])
    elif args.one:
        start(FAMILIES[args.family], *RUNS[args.one])
    else:
        compare(args)


def compare(args):
    """Print the table: every run's CPU and wall seconds, the least of all rounds, and their ratio to transformers'."""
    from measure import ROOT, machine, run, table

    print(machine(), flush=True)
    found = {name: [] for name in RUNS}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        recipe = ROOT / FAMILIES[args.family].replace(".", "/") / "train.py"
        run([recipe, "--model_save_dir", "adapter", *ONE_STEP, "cache"])
        for number in range(args.rounds):
            for name in RUNS:
                result, seconds, _ = run([__file__, "--one", name, "--family", args.family])
                found[name].append((result["cpu"], seconds))
                print(f"round {number + 1}, {name}: CPU {result['cpu']:.2f} s, {seconds:.2f} s", file=sys.stderr)
    least = {name: [min(column) for column in zip(*values, strict=True)] for name, values in found.items()}
    rows = [
        [name, f"{cpu:.2f}", f"{cpu / least[BARE][0]:.2f}", f"{wall:.2f}", f"{wall / least[BARE][1]:.2f}"]
        for name, (cpu, wall) in least.items()
    ]
    print(f"\n{args.family}, the least of {args.rounds}\n")
    print(table(["start", "CPU s", "ratio", "seconds", "ratio"], rows))


def one_token(package):
    """What transformers alone does: import, load, generate one token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = importlib.import_module(f"{package}.config").Config.EMBEDDED_DIR
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": QUERY[1]}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokenizer.decode(model.generate(**prompt, max_new_tokens=1)[0])
    end()


def start(package, recipe, flags):
    """A recipe until its first token or step."""
    from common.errors import run_main

    main_of = importlib.import_module(f"{package}.{recipe}").main
    if recipe == "train":
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(lambda *_: end())
        folder = tempfile.mkdtemp(dir=".")
        flags = [*flags[:-1], folder if flags[-1] == "new" else flags[-1]]
        saved = str(Path(folder) / "run")
    else:
        saved = "adapter"
    run_main(lambda: main_of([*flags, "--model_save_dir", saved]))
    end()


def end():
    """Print the CPU seconds of this process and its children so far, and end at once."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print("\n" + json.dumps({"cpu": sum(one.ru_utime + one.ru_stime for one in used)}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
