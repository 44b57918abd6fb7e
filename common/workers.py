"""Chunks of work given to several processes, their results in order, never more than a few chunks in memory."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

from common import garbage
from common.errors import UserError

ALONE = 8  # chunks at most that this process works through by itself: starting others takes seconds
MOST = 16  # processes

_arguments: Sequence[Any] = ()  # of a worker: what `function` takes after the chunk


def map_chunks(function: Callable[..., Any], chunks: Iterable, *arguments: Any) -> Iterator[Any]:
    """Yield function(chunk, *arguments) of each chunk, in order.

    More than ALONE chunks are worked through by one process a core, and here until the first of these has started.
    Processes get function, chunk and arguments pickled, except modules, which they import by name. UserError where one
    of them dies.
    """
    chunks, count = iter(chunks), min(cores(), MOST)
    first = list(islice(chunks, ALONE + 1)) if count > 1 else []
    chunks = chain(first, chunks)
    if len(first) > ALONE:
        yield from _by_processes(function, chunks, arguments, count)
    else:
        yield from (function(chunk, *arguments) for chunk in chunks)


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _by_processes(
    function: Callable[..., Any], chunks: Iterable, arguments: Sequence[Any], count: int
) -> Iterator[Any]:
    """Processes are spawned, not forked: this one has threads, a model, perhaps a CUDA context."""
    names = [argument.__name__ if isinstance(argument, type(os)) else None for argument in arguments]
    values = pickle.dumps([None if name else argument for name, argument in zip(names, arguments, strict=True)])
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _start_worker, (names, values))
    with _deaf():
        started = [pool.submit(os.getpid) for _ in range(count)]
    waiting: deque[Future] = deque()
    try:
        for chunk in chunks:
            if not (waiting or any_ready(started)):
                yield function(chunk, *arguments)  # they import what they need; meanwhile this process goes on
                continue
            waiting.append(pool.submit(_work, function, chunk))
            if len(waiting) > 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("编码进程意外结束 a tokenising process died; is there too little memory? Run again") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # one that has not started by now is not waited for


@contextmanager
def _deaf() -> Iterator[None]:
    """Within, processes are started that do not hear Ctrl-C: until they import they would each show a traceback."""
    if hasattr(signal, "pthread_sigmask"):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def any_ready(started: Iterable[Future]) -> bool:
    """Whether one of the processes has started: its first piece of work is done, or it died."""
    return any(map(Future.done, started))


def _start_worker(names: list[str | None], values: bytes) -> None:
    """Make a new process ready: its arguments, Ctrl-C left to the parent, and an end when the parent is gone.

    names: of modules; values: pickled, what the other arguments are.
    """
    global _arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    garbage.look_rarely()
    given = zip(names, pickle.loads(values), strict=True)  # which imports libraries
    _arguments = [importlib.import_module(name) if name else value for name, value in given]
    garbage.look_as_usual()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
    os._exit(1)


def _work(function: Callable[..., Any], chunk: Any) -> Any:
    return function(chunk, *_arguments)
