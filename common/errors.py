"""Errors a user can act on: one line that says what, where and how to mend it, whatever the number of processes."""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from common import garbage, launch

NO_MEMORY = re.compile("out of memory|can't allocate memory", re.IGNORECASE)  # CUDA and Apple's GPUs; the CPU


class UserError(Exception):
    """Something the user can put right. Its text is one line: Chinese first, then the key facts in English."""

    exit_code = 1
    everywhere = False  # whether all processes raise it; then only the first one says it


def run_main(main: Callable[[], object]) -> None:
    """Call `main()` as a script: a UserError or a full disk becomes one line on stderr, Ctrl-C exit code 130.

    Of several processes the first one prints; another prints only an error that the first does not have.
    """
    if launch.rank():
        launch.hush()
    garbage.look_rarely()
    try:
        main()
    except UserError as error:
        launch.let_first_speak(launch.SHORT if error.everywhere else launch.GRACE)
        if not (launch.rank() and error.everywhere):
            print(f"错误 error: {error}", file=sys.stderr)
        _end(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _end_of(error)


def _end_of(error: Exception) -> NoReturn:
    """End with what is to be said of an error that is no UserError: a line the user can act on, or its traceback."""
    line = _line_of(error)
    if line is None and launch.world_size() == 1:
        raise error
    if launch.world_size() > 1 and _lost_another(error):
        time.sleep(launch.GRACE)  # the launcher ends this one too
    else:
        launch.let_first_speak()
    if line is None:
        sys.excepthook(*sys.exc_info())
    else:
        print(f"错误 error: {line}", file=sys.stderr)
    _end(1)


def _line_of(error: Exception) -> str | None:
    """A line that says what, where and how to mend it; None where only the traceback says it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.filename or ''}: 磁盘已满 the disk is full ({error.strerror}); make room"
    if is_out_of_memory(error):
        found = " ".join(str(error).split())[:200] or type(error).__name__
        return (
            f"内存或显存不足 out of memory ({found}); train.py: --gradient_checkpointing true, a smaller "
            "--micro_batch_size or --max_length_q and --max_length_a, --tuning qlora; evaluation.py and "
            "predict.py --output: a smaller --eval_batch_size; post_api.py: fewer --slots"
        )
    if launch.world_size() > 1 and _lost_another(error):
        return "另一个进程退出了 another process ended; its error, if any, is above"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, the machine's or a GPU's."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error)))


def _end(code: int) -> NoReturn:
    """Exit; one of several processes without tidying up, which takes time and may wait for those that are gone."""
    if launch.world_size() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _lost_another(error: Exception) -> bool:
    """Whether `error` only says that another process is gone."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or any(text in str(error) for text in ("closed by peer", "reset by peer"))


class RowError(ValueError):
    """Why a row cannot be used: `kind`, a key of common/data/defects.py's DEFECTS, and `reason`, a line for people."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason

    def __str__(self) -> str:
        return self.reason
