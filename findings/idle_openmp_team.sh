#!/usr/bin/env bash
# torch on a CPU: a thread computes several times slower because another thread has computed something before
#
# What one would guess: a thread that is idle costs nothing. A program that loads its model in the main thread and answers in
# a worker thread (a web service, a stream of tokens) is as fast as one that does both in one thread.
# What happens (torch 2.13.0, its wheel for Linux with GNU's OpenMP, 2 cores, 2026-11-28): each thread that runs a parallel
# operation keeps a team of OpenMP threads of its own. With the teams of two threads there are more OpenMP threads than
# cores, and libgomp then lets all of them go to sleep at the end of every parallel region instead of waiting awake. Small
# products take 4 to 5 times as long. One large addition in the main thread is enough. Where that thread has ended, its
# team has too, and nothing is lost.
# Why it matters: a small model behind a service gave a token in 6 ms, and in 1.6 ms once it was loaded in a thread that ends.
# Nothing shows it but the clock: the threads are idle, the cores are not busy, the values are the same.
#
# Output seen (seconds, the least of three):
#   torch 2.13.0+cpu, threads 2
#   guess: all three within a third of each other
#   products in a worker thread: 0.43
#   after one addition in the main thread: 2.12
#   after one addition in a thread that has ended: 0.47
#   as stated: an idle thread's team makes another thread's products slow
set -euo pipefail
export PYTHONDONTWRITEBYTECODE=1
unset OMP_NUM_THREADS OMP_WAIT_POLICY GOMP_SPINCOUNT MKL_NUM_THREADS
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$work"
cat > one.py <<'PY'
import sys
import threading
import time

import torch

torch.manual_seed(0)
layers = [torch.randn(384, 384) for _ in range(4)]
x = torch.randn(16, 384)


def products(found):
    for _ in range(200):  # warm
        for w in layers:
            torch.mm(x, w)
    started = time.perf_counter()
    for _ in range(1500):
        for w in layers:
            torch.softmax(torch.mm(x, w), 1)
    found.append(time.perf_counter() - started)


def in_a_thread(function, *args):
    thread = threading.Thread(target=function, args=args)
    thread.start()
    thread.join()


def seconds(first):
    found = []
    if first == "main":
        torch.zeros(1 << 22).add_(1)
    elif first == "ended":
        in_a_thread(lambda: torch.zeros(1 << 22).add_(1))
    in_a_thread(products, found)
    print(found[0])


seconds(sys.argv[1])
PY
venv/bin/python - <<'PY'
import subprocess
import sys

import torch

print(f"torch {torch.__version__}, threads {torch.get_num_threads()}")
print("guess: all three within a third of each other")


def least(first):
    runs = [subprocess.run([sys.executable, "one.py", first], capture_output=True, text=True, check=True) for _ in range(3)]
    return min(float(run.stdout) for run in runs)


alone, beside, ended = map(least, ("nothing", "main", "ended"))
print(f"products in a worker thread: {alone:.2f}")
print(f"after one addition in the main thread: {beside:.2f}")
print(f"after one addition in a thread that has ended: {ended:.2f}")
if not (beside > 1.5 * alone and ended < 1.33 * alone):
    sys.exit("changed, or no GNU OpenMP with a thread for each core: an idle thread's team costs nothing here")
print("as stated: an idle thread's team makes another thread's products slow")
PY
