"""A training step and an answer on a machine that others keep busy: beside no, one and two processes that compute.

python benchmarks/busy.py                              # the family's default run
python benchmarks/busy.py --family qwen --blocks 2
OMP_WAIT_POLICY=ACTIVE python benchmarks/busy.py       # with another setting of OpenMP
"""

import argparse
import importlib
import statistics
import subprocess
import sys
import tempfile
import time

from measure import ROOT, machine, table

FAMILIES = {"gemma": "gemma_sft.ft_gemma", "qwen": "qwen2_sft.ft_qwen2", "chatglm": "chatglm_sft.ft_chatglm"}
BUSY = (0, 1, 2)  # processes beside
STEPS, UNTIMED = 12, 4  # of a block; within the first ones the change is noticed
NOTICED = 1.2  # seconds until an answer is timed
ASKED = {"ms an answer": 1, "ms 32 answers": 32}  # prompts in a batch; 48 tokens each


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="gemma")
    parser.add_argument("--blocks", type=int, default=4, help="of steps, for each number of processes, in turn")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    found = {count: [] for count in BUSY}
    watch = Watch(found, args.blocks)
    train = importlib.import_module(f"{FAMILIES[args.family]}.train").main
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda *_: watch.step())
    steps = 1 + args.blocks * len(BUSY) * STEPS
    with tempfile.TemporaryDirectory() as folder:
        common = ["--model_save_dir", folder, "--eval_rows", "0", "--val_set_size", "0", "--save_steps", str(steps)]
        try:
            train([*common, "--max_steps", str(steps)])
            answers = answer(FAMILIES[args.family], folder, watch, args.blocks)
        finally:
            watch.beside(0)
    print(machine())
    report(f"{args.family}, training", {"ms a step": found})
    report(f"{args.family}, answering", answers)


def answer(package, folder, watch, blocks):
    """{what is timed: {processes beside: seconds of each time}} of answers by the run in the folder."""
    from common.conversation.turns import Turn
    from common.inference.answerer import Sampling

    config = importlib.import_module(f"{package}.config").Config(model_save_dir=folder)
    answer = importlib.import_module(f"{package}.predict").load_answer(config)
    questions = [[Turn("user", f"类型#裙*颜色#白色*风格#性感*长度#{number}")] for number in range(max(ASKED.values()))]
    found = {name: {count: [] for count in BUSY} for name in ASKED}
    for count in [count for _ in range(blocks) for count in BUSY]:
        watch.beside(count)
        time.sleep(NOTICED)
        for name, rows in ASKED.items():
            for _ in range(3):
                begin = time.perf_counter()
                answer(questions[:rows], Sampling(max_new_tokens=48))
                found[name][count].append(time.perf_counter() - begin)
    return found


class Watch:
    """Told of each step's end: changes the number of processes beside, and keeps the seconds of steps under it."""

    def __init__(self, found, blocks):
        self.found = found
        self.plan = [count for _ in range(blocks) for count in BUSY for _ in range(STEPS)]
        self.done, self.last, self.others = -1, 0.0, []

    def step(self):
        now = time.perf_counter()
        if self.done >= 0 and self.done % STEPS >= UNTIMED:
            self.found[self.plan[self.done]].append(now - self.last)
        self.done += 1
        self.beside(self.plan[self.done] if self.done < len(self.plan) else 0)
        self.last = time.perf_counter()

    def beside(self, count):
        """Let `count` processes compute from now on."""
        while len(self.others) > count:
            other = self.others.pop()
            other.kill()
            other.wait()
        while len(self.others) < count:
            self.others.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))


def report(title, found):
    """Print mean and median of each thing timed, {name: {processes beside: seconds}}, and its ratio to the quiet."""
    rows = []
    for name, times in found.items():
        quiet = statistics.mean(times[0])
        for count, seconds in times.items():
            mean = statistics.mean(seconds)
            middle = statistics.median(seconds)
            rows.append([name, count, f"{mean * 1000:.0f}", f"{middle * 1000:.0f}", f"{mean / quiet:.2f}"])
    print(f"\n{title}\n")
    print(table(["", "busy processes beside", "mean", "median", "ratio"], rows))


if __name__ == "__main__":
    main()
