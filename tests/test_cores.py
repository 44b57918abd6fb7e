"""How threads wait for each other while other processes want the cores, and that nothing else changes by it."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from common import cores

ROOT = Path(__file__).resolve().parents[1]
TWO_THREADS = """
import threading
import torch
from common.cores import Waiting

torch.set_num_threads(2)
torch.manual_seed(0)
x, y = torch.randn(700, 300), torch.randn(300, 500)

def computed():
    return (x @ y).sum(0), torch.nn.functional.softmax(x, -1), x.sum()

def system_threads():
    return int(next(line for line in open("/proc/self/status") if line.startswith("Threads")).split()[1])

awake, before = computed(), system_threads()
waiting = Waiting()
waiting.cores = [0, 1]
waiting.sleep()
asleep = computed()
assert all(map(torch.equal, awake, asleep))
print(system_threads() - before, len(waiting.held))
waiting.close()
print(threading.active_count(), len(waiting.held), all(map(torch.equal, awake, computed())))
"""

ENDS_MEANWHILE = """
import threading
import torch
from common import cores

inside = threading.Event()

def look(waiting):
    inside.set()
    torch.ones(1200, 1200) @ torch.ones(1200, 1200) @ torch.ones(1200, 60_000)

cores.SOON, cores.Waiting.look = 0, look
cores.share()
inside.wait()
"""

STOPPED = """
import os
import signal
import threading
import time
from common.cores import apart
from common.errors import run_main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs behind it deaf to Ctrl-C

def load():
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    for _ in range(3000):
        time.sleep(0.01)
    print("loaded")

run_main(lambda: apart(load))
"""


@pytest.fixture
def waiting(monkeypatch):
    """(a Waiting on two cores with two threads, pass_seconds(seconds, by others of both cores, by this process))."""
    now = {"monotonic": 100.0, "own": 5.0, "all": 50.0}
    monkeypatch.setattr(cores.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(cores.time, "monotonic", lambda: now["monotonic"])
    monkeypatch.setattr(cores.time, "process_time", lambda: now["own"])
    idle = now["all"]
    monkeypatch.setattr(
        cores.psutil, "cpu_times", lambda percpu: [(now["all"] / 2, 0.0, 0.0, idle), (now["all"] / 2, 0.0, 0.0, idle)]
    )
    made = cores.Waiting()
    monkeypatch.setattr(made, "sleep", lambda: made.held.append("asleep"))
    monkeypatch.setattr(made, "close", made.held.clear)

    def pass_seconds(seconds, others, own):
        now["monotonic"] += seconds
        now["own"] += own
        now["all"] += others + own
        made.look()
        return bool(made.held)

    return pass_seconds


def test_threads_sleep_while_others_use_cores(waiting):
    assert not waiting(1, others=0.1, own=2), "what this process uses itself does not count"
    assert waiting(1, others=1, own=1)
    assert waiting(1, others=0.2, own=1.5), "neither many nor few"
    assert not waiting(1, others=0.1, own=1.8)


def test_what_others_used_while_the_process_was_stopped_does_not_count(waiting):
    assert not waiting(30, others=60, own=0)
    assert waiting(1, others=1, own=1)


def test_where_others_cannot_be_seen_nothing_changes(waiting, monkeypatch):
    """A sandbox hides /proc/stat: training goes on."""

    def hidden(percpu):
        raise PermissionError(13, "Permission denied", "/proc/stat")

    monkeypatch.setattr(cores.psutil, "cpu_times", hidden)
    assert not cores.Waiting().held
    assert not waiting(1, others=2, own=0)


def test_one_thread_waits_for_none(waiting, monkeypatch):
    monkeypatch.setattr(cores.torch, "get_num_threads", lambda: 1)
    assert not waiting(1, others=2, own=0)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="counts the threads that Linux shows")
def test_idle_threads_are_held_and_end_and_results_stay():
    found = subprocess.run([sys.executable, "-c", TWO_THREADS], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    held, after = found.stdout.splitlines()
    assert held == "2 1", "one idle thread, and the other one of its team"
    assert after == "1 0 True"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="nobody looks where cores are not known")
def test_a_process_may_end_while_it_looks():
    """Not with "terminate called without an active exception" and exit code 134."""
    found = subprocess.run([sys.executable, "-c", ENDS_MEANWHILE], capture_output=True, text=True, cwd=ROOT)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.skipif(os.name == "nt", reason="no Ctrl-C is sent like this")
def test_ctrl_c_ends_what_is_computed_apart():
    """A large model was read to its end first."""
    found = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True, cwd=ROOT)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "")


def test_the_kernel_is_asked_in_the_order_it_answers():
    if hasattr(psutil.cpu_times(), "iowait"):  # Linux
        assert psutil.cpu_times()._fields[:3] == ("user", "nice", "system")
