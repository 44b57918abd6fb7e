"""Seconds of train.py --check on many rows: nothing tokenised yet, then again; beside another checkout of the project.

python benchmarks/check.py                             # 100,000 rows, three rounds
python benchmarks/check.py --rows 1000000 --rounds 1
python benchmarks/check.py --beside ../before          # and the same in that folder, in turn
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from measure import ROOT, machine, run, table

from data import write_rows

TRAIN = "gemma_sft/ft_gemma/train.py"
STARTS = ("first", "again")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beside", type=Path, help="another checkout")
    args = parser.parse_args()
    print(machine(), flush=True)
    trees = {"here": ROOT} | ({"beside": args.beside.resolve()} if args.beside else {})
    found = {(tree, start): [] for tree in trees for start in STARTS}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_rows(data, args.rows)
        for number in range(args.rounds):
            for tree, root in trees.items():
                given = [
                    "--data_path",
                    data,
                    "--cache_dir",
                    f"{folder}/{tree}{number}",
                    "--model_save_dir",
                    f"{folder}/run",
                ]
                for start in STARTS:
                    _, seconds, memory = run([root / TRAIN, "--check", *given], PYTHONPATH=str(root))
                    found[tree, start].append((seconds, memory))
                    print(f"round {number + 1}, {tree}, {start}: {seconds:.1f} s, {memory:.0f} MiB", file=sys.stderr)
    medians = {
        key: [statistics.median(column) for column in zip(*values, strict=True)] for key, values in found.items()
    }
    rows = [
        [tree, start, f"{seconds:.1f}", f"{seconds / medians['here', start][0]:.2f}", f"{memory:.0f}"]
        for (tree, start), (seconds, memory) in medians.items()
    ]
    print(f"\n--check of {args.rows:,} rows, the median of {args.rounds}\n")
    print(table(["tree", "start", "seconds", "of ours", "peak MiB"], rows))


if __name__ == "__main__":
    main()
