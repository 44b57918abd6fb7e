#!/usr/bin/env bash
# tokenizers 0.23: each thread that encodes keeps up to 50 MiB of Chinese words, as long as it lives
#
# What one would guess: a tokenizer that many threads share has one cache, whose size does not depend on their number.
# What happens (tokenizers 0.23.3, 2026-11-29): the words of a BPE model are kept once for each thread. Text without blanks
# is one word a sentence for the usual pre-tokenizers, so an entry is 2.4 KB and a full cache 50 MiB. It is freed when the
# thread ends, not when the tokenizer is deleted.
# Why it matters: a Chinese service with a pool of 100 threads, each of which encodes its requests, grows by up to 5 GiB,
# over days, while Python's own tools show nothing.
#
# Output seen:
#   tokenizers 0.23.3
#   guess: after the first thread no more is kept
#   4 threads, 25000 texts each: 50, 101, 151, 202 MiB
#   the tokenizer deleted: 201 MiB
#   the threads ended: 0 MiB
#   as stated: each thread keeps its own
set -euo pipefail
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/hf"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check tokenizers==0.23.3
cd "$work"
venv/bin/python - <<'PY'
import ctypes
import random
import sys
import threading

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

THREADS, TEXTS = 4, 25000
CHINESE = [chr(0x4E00 + number) for number in range(3000)]


class Mallinfo(ctypes.Structure):
    _fields_ = [(f"f{number}", ctypes.c_size_t) for number in range(10)]


libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = Mallinfo


def used():
    """MiB in use of what the C library has given out."""
    found = libc.mallinfo2()
    return (found.f7 + found.f4) / 2**20


def text(dice):
    return "".join(dice.choices(CHINESE, k=dice.randint(10, 80)))


print("tokenizers", tokenizers.__version__)
print("guess: after the first thread no more is kept")
dice = random.Random(0)
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
tokenizer.train_from_iterator((text(dice) for _ in range(500)), trainer)
tokenizer.encode("你好")
start, done, over, kept, threads = used(), threading.Semaphore(0), threading.Event(), [], []


def work(seed, tokenizer):
    dice = random.Random(seed)
    for _ in range(TEXTS):
        tokenizer.encode(text(dice))
    del tokenizer
    done.release()
    over.wait()


for seed in range(THREADS):
    threads.append(threading.Thread(target=work, args=(seed, tokenizer)))
    threads[-1].start()
    done.acquire()
    kept.append(used() - start)
print(f"{THREADS} threads, {TEXTS} texts each: {', '.join(f'{one:.0f}' for one in kept)} MiB")
del tokenizer, trainer
deleted = used() - start
print(f"the tokenizer deleted: {deleted:.0f} MiB")
over.set()
for thread in threads:
    thread.join()
ended = used() - start
print(f"the threads ended: {abs(ended):.0f} MiB")
each = [late - early for early, late in zip([0, *kept], kept)]
if min(each) < 30 or deleted < 0.8 * kept[-1] or ended > 0.2 * kept[-1]:
    sys.exit("changed: threads no longer keep their own words as stated")
print("as stated: each thread keeps its own")
PY
