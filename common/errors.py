"""Errors a user can act on: one line that says what, where and how to mend it, whatever the number of processes."""

import errno
import os
import sys
import time

from common import launch


class UserError(Exception):
    """Something the user can put right. Its text is one line: Chinese first, then the key facts in English."""

    exit_code = 1
    everywhere = False  # whether all processes are known to raise it, so that the first alone has to say it


def run_main(main):
    """Call `main()` as a script: a UserError or a full disk becomes one line on stderr, Ctrl-C exit code 130.

    Of several processes the first prints; another one only an error that the first does not have.
    """
    if launch.rank():
        launch.hush()
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


def _end_of(error):
    """End with what is to be said of an error that is no UserError: a line for a full disk, or its traceback."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        line = f"{error.filename or ''}: 磁盘已满 the disk is full ({error.strerror}); make room"
    elif launch.world_size() > 1 and _lost_another(error):
        line = "另一个进程退出了 another process ended; its error, if any, is above"
        time.sleep(launch.GRACE)  # its launcher ends this one too
    elif launch.world_size() > 1:
        launch.let_first_speak()
        sys.excepthook(*sys.exc_info())
        _end(1)
    else:
        raise error
    print(f"错误 error: {line}", file=sys.stderr)
    _end(1)


def _end(code):
    """Exit; one of several processes without tidying up, which takes time and may wait for those that are gone."""
    if launch.world_size() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _lost_another(error):
    """Whether `error` only says that another process is gone."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or any(text in str(error) for text in ("closed by peer", "reset by peer"))
