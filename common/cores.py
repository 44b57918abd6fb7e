"""How the threads of one computation wait for each other on a CPU: awake on a quiet machine, asleep on a busy one.

torch divides each product among OpenMP's threads, which wait for the last of them at its end. GNU's OpenMP (that of
torch's wheels for Linux) lets them wait awake for some milliseconds: the next product comes sooner than a sleeper
wakes. Beside other processes that is the wrong way: who waits keeps the core that the one waited for needs. What the
environment says of it (OMP_WAIT_POLICY, GOMP_SPINCOUNT) holds for a whole process, but while there are more of its
threads than cores it lets all of them sleep (gomp_throttled_spin_count_var in libgomp's wait.h and env.c). So threads
that do nothing are held while others compute. How work is divided stays the same, and so does each result.
Beside one busy process on two cores a training step takes half the time by it, a small model's answer a fifth.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import torch

SOON, PAUSE = 0.2, 0.5  # seconds until the first look, and between two: the kernel counts in hundredths
LATE = 2.0  # seconds between two looks that tell nothing of now: the process was stopped, or the machine asleep
BEGIN, END = 0.3, 0.15  # cores that others use beyond those left to them: from here on asleep, below that awake
GRAIN = 1 << 15  # values that torch gives each thread at the least


def apart(function: Callable[[], Any]) -> Any:
    """What `function` returns, called in a thread of its own, whose team of OpenMP's threads ends with it.

    For what computes before another thread does for long: with both teams there are more threads than cores, and each
    product waits for a sleeper. A small model answers in a third of the time without the first team.
    """
    with ThreadPoolExecutor(1) as pool:
        ident = pool.submit(threading.get_ident).result()
        try:
            return pool.submit(function).result()
        except KeyboardInterrupt:  # raised there too: else Ctrl-C would wait until all weights are read
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(KeyboardInterrupt))
            raise


@functools.cache  # once a process
def share() -> None:
    """From now on let this process's threads wait asleep while others use its cores, whatever it computes."""
    waiting = Waiting()
    if waiting.cores:
        ended = threading.Event()
        looking = threading.Thread(target=_keep_looking, args=(waiting, ended), daemon=True)
        looking.start()
        atexit.register(_stop, looking, ended)


def _keep_looking(waiting: Waiting, ended: threading.Event) -> None:
    pause = SOON
    while not ended.wait(pause):
        waiting.look()
        pause = PAUSE


def _stop(looking: threading.Thread, ended: threading.Event) -> None:
    """End the thread that looks: where Python ends while a thread is inside torch, the process aborts (SIGABRT)."""
    ended.set()
    looking.join()


class Waiting:
    """Lets this process's threads wait asleep while others use its cores; `look` is called from time to time."""

    def __init__(self) -> None:
        self.cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.spare = len(self.cores) - torch.get_num_threads()  # cores that others may have
        self.last = self._used()
        self.held: list[threading.Thread] = []
        self.release = threading.Event()

    def look(self) -> None:
        """See what others have used since the last look, and change how the threads wait where that is due."""
        if torch.get_num_threads() == 1 or not self.cores:
            return
        before, self.last = self.last, self._used()
        passed, theirs = (new - old for new, old in zip(self.last, before, strict=True))
        if passed > LATE:
            return
        beyond = theirs / passed - self.spare
        if not self.held and beyond > BEGIN:
            self.sleep()
        elif self.held and beyond < END:
            self.close()

    def sleep(self) -> None:
        """Hold so many idle threads that GNU's OpenMP lets those that wait sleep."""
        self.release = threading.Event()
        count = len(self.cores) // torch.get_num_threads() or 1
        ready = threading.Barrier(count + 1)
        self.held = [threading.Thread(target=_hold, args=(ready, self.release), daemon=True) for _ in range(count)]
        for thread in self.held:
            thread.start()
        ready.wait()

    def close(self) -> None:
        """Let the idle threads end."""
        self.release.set()
        for thread in self.held:
            thread.join()
        self.held = []

    def _used(self) -> tuple[float, float]:
        """(monotonic seconds, seconds that others have used of this process's cores so far)."""
        now, own = time.monotonic(), time.process_time()
        try:
            each = psutil.cpu_times(percpu=True)
        except OSError:  # a sandbox hides /proc/stat: then nobody else is seen
            each = []
        used = [sum(each[core][:3]) for core in self.cores if core < len(each)]  # user, nice, system
        return now, sum(used) - own


def _hold(ready: threading.Barrier, release: threading.Event) -> None:
    """Have a team of OpenMP's threads of one's own, idle until `release`."""
    torch.zeros(GRAIN * torch.get_num_threads()).add_(1)
    ready.wait()
    release.wait()
