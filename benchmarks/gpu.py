"""All that a GPU is to show, in one command of at most eight minutes: its tests, training beside TRL, generation.

python benchmarks/gpu.py                       # a Gemma-2B of random weights in bfloat16: 12 GiB of GPU memory
python benchmarks/gpu.py --model DIR --data data/product_train.jsonl    # a checkpoint and real rows

Each part gets what is left of the time; one that fails or is late is named at the end, with exit code 1.
"""

import argparse
import os
import signal
import subprocess
import sys
import time

from measure import ROOT, machine

SECONDS = 470  # of the eight minutes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="2b", help="as --model of train.py")
    parser.add_argument("--data", help="as --data of train.py; without it every row has 1,024 random ids")
    parser.add_argument("--rows", type=int, default=128, help="rows trained on in a run")
    parser.add_argument("--prompts", type=int, default=128, help="prompts answered")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="some of the parts")
    args = parser.parse_args()
    print(machine(), card(), sep=", ", flush=True)
    end, missing = time.monotonic() + SECONDS, []
    for part in args.parts:
        print(f"\n{part}", flush=True)
        if not finished([sys.executable, *PARTS[part](args)], end - time.monotonic()):
            missing.append(part)
    if missing:
        raise SystemExit(f"not finished: {', '.join(missing)}")


def tests(args):
    return ["-m", "pytest", "-q", "-n0", "-m", "gpu"]


def training(args):
    command = ["benchmarks/train.py", "--model", args.model, "--rounds", "1", "--rows", str(args.rows)]
    command += ["--data", args.data] if args.data else ["--length", "1024"]
    return [*command, "--dtype", "bfloat16", "--runs", "trl, grouped", "ours"]


def generation(args):
    return ["benchmarks/generate.py", "--family", "gemma", "--rounds", "1", "--prompts", str(args.prompts)]


PARTS = {"tests": tests, "training": training, "generation": generation}


def finished(command, seconds):
    """Whether the command ends well within `seconds`; what it prints is shown as it comes."""
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
        try:
            return process.wait(max(1, seconds)) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and the processes it has started
            return False


def card():
    """The card's name and memory."""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA card"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / (1 << 30):.0f} GiB"


if __name__ == "__main__":
    main()
