"""LoRA training here, in TRL's SFTTrainer and in ms-swift: one model, rows and precision, in turn, in fresh processes.

python benchmarks/train.py                                    # both models, five rounds, the tables of README.md
python benchmarks/train.py --model head --rounds 1 --rows 16  # a quick look
python benchmarks/train.py --curves                           # the loss of every step on the same batches
python benchmarks/train.py --model DIR --data data/product_train.jsonl --rows 24    # a checkpoint and rows of a file
python benchmarks/train.py --model 2b --length 1024 --dtype bfloat16 --runs "trl, grouped" "trl, Liger" ours   # a GPU
python benchmarks/train.py --targets all-linear all-embedding lm_head --runs swift ours "swift, grouped"  # the head too

ours                  common/training/trainer.py as train.py calls it
ours, checkpointing   the same with --gradient_checkpointing
trl                   SFTTrainer at its defaults
trl, no checkpointing the same without checkpointing
trl, grouped          without checkpointing, with batches grouped by length
trl, Liger            that with Liger's kernels, which need a GPU
trl, our batches      without checkpointing, on the very batches ours takes (--curves)
swift                 `swift sft` at its defaults, in an environment of its own (train.txt, --venvs)
swift, grouped        without checkpointing, with sdpa and batches grouped by length
swift, our batches    that on the very batches ours takes

All: loss on the answers only, micro batch 4, LoRA r 16 on --targets (q/k/v), AdamW, no dropout, the same --dtype.
TRL refuses LoRA on the head, so that where it is trained the peer is ms-swift (--curves too).
Packing is left out: without FlashAttention, TRL's packed rows would see each other.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from measure import ROOT, VENVS, machine, python_of, run, table
from train_once import OTHERS, OURS, RUNS, SEED, SWIFT, SWIFT_OUR_BATCHES, TARGETS, TRL_OUR_BATCHES, train

MODELS = {
    "quarter": dict(hidden_size=512, num_hidden_layers=18, intermediate_size=4096, vocab_size=64_000),
    "head": dict(hidden_size=256, num_hidden_layers=4, intermediate_size=2048, vocab_size=256_000),
    "2b": dict(hidden_size=2048, num_hidden_layers=18, intermediate_size=16_384, vocab_size=256_000),  # for a GPU
    "small": dict(hidden_size=64, num_hidden_layers=2, intermediate_size=128, vocab_size=2_000),  # to try this script
}


def main():
    args = arguments()
    if args.one:
        print(json.dumps(train(args.one, args)))
        return
    print(machine())
    for name in [args.model] if args.model else ("quarter", "head"):
        with tempfile.TemporaryDirectory() as folder:
            if name in MODELS:
                make_model(MODELS[name], folder)
            if args.curves:
                compare_curves(name, folder, args)
            else:
                compare_speed(name, folder, args)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model, help=f"one of {' '.join(MODELS)}, or a folder with a checkpoint")
    parser.add_argument("--data", help="a file of rows, as --data_path of train.py; without it rows are random ids")
    parser.add_argument("--rounds", type=int, default=5, help="times each run is made, in turn")
    parser.add_argument("--rows", type=int, default=128, help="rows trained on in a run")
    parser.add_argument("--length", type=int, help="ids of every row, in place of rows of many lengths")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="what LoRA is on")
    parser.add_argument("--runs", nargs="+", default=RUNS, choices=(*RUNS, *OTHERS))
    parser.add_argument("--venvs", type=Path, default=VENVS, help="where the environment of ms-swift is made")
    parser.add_argument("--curves", action="store_true", help="compare losses on the same batches instead of speed")
    parser.add_argument("--one", choices=(*RUNS, *OTHERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--output_dir", help=argparse.SUPPRESS)
    return parser.parse_args()


def model(name):
    """`name`, of one of MODELS or a folder with a checkpoint."""
    if name in MODELS or (Path(name) / "config.json").is_file():
        return name
    raise argparse.ArgumentTypeError(f"{name}: none of {' '.join(MODELS)}, nor a folder with config.json")


def compare_speed(name, folder, args):
    """Print the table of one model: medians over the rounds, and ratios to TRL."""
    found = {which: [] for which in args.runs}
    for round_ in range(args.rounds):
        for which in args.runs:
            found[which].append(start(which, folder, args))
            shown = {key: value for key, value in found[which][-1].items() if key != "losses"}
            print(f"{name}, round {round_ + 1}, {which}: {shown}", file=sys.stderr, flush=True)
    median = {
        which: {key: statistics.median(r[key] for r in results) for key in results[0] if key != "losses"}
        for which, results in found.items()
    }
    first = median[args.runs[0]]
    rows = [
        [which, f"{m['tokens_per_second']:.0f}", f"{m['supervised_per_second']:.0f}", f"{m['padding']:.1%}"]
        + [f"{m['peak_mib']:.0f}", f"{m['matrix_rate']:.0f}", f"{m['share']:.0%}"]
        + [f"{m['tokens_per_second'] / first['tokens_per_second']:.2f}", f"{m['peak_mib'] / first['peak_mib']:.2f}"]
        for which, m in median.items()
    ]
    print(f"\n{name}: {MODELS.get(name, args.data)}, {args.rows} rows, {args.dtype}, median of {args.rounds}\n")
    header = ["run", "tokens/s", "supervised/s", "padding", "peak MiB", "GFLOP/s of a matrix product", "share of it"]
    print(table([*header, f"speed, {args.runs[0]} = 1", "memory"], rows))


def compare_curves(name, folder, args):
    """Print the largest relative difference of the two losses of a step on the same batches."""
    peer = SWIFT_OUR_BATCHES if "lm_head" in args.targets else TRL_OUR_BATCHES
    ours, theirs = (start(which, folder, args)["losses"] for which in (OURS, peer))
    apart = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    print(
        f"\n{name}: {len(ours)} steps, loss {ours[0]:.5f} to {ours[-1]:.5f}, {peer} {theirs[0]:.5f} to {theirs[-1]:.5f}"
    )
    print(f"largest relative difference of a step: {max(apart):.1e}")


def start(which, folder, args):
    """What a fresh process says of one run; `folder` is written to, and holds the model where it is made here."""
    base = folder if args.model in (None, *MODELS) else args.model
    command = [Path(__file__), "--one", which, "--folder", base, "--output_dir", folder, "--rows", args.rows]
    command += ["--dtype", args.dtype, "--targets", *args.targets]
    command += ["--length", args.length] if args.length else []
    command += ["--data", args.data] if args.data else []
    python = python_of("ms-swift", __file__, args.venvs) if which.startswith(SWIFT) else sys.executable
    return run(command, python)[0]


def make_model(shape, folder):
    """A random Gemma and a random adapter, the same for every run."""
    import torch
    from transformers import AutoTokenizer, GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(num_attention_heads=8, num_key_value_heads=1, head_dim=256, tie_word_embeddings=True, **shape)
    torch.manual_seed(SEED)
    GemmaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "gemma_sft/embedded").save_pretrained(folder)  # ms-swift looks for one


if __name__ == "__main__":
    main()
