"""Errors a user can act on: one line that says what, where and how to mend it, whatever the number of processes."""

import errno
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
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(
            f"错误 error: {error.filename or ''}: 磁盘已满 the disk is full ({error.strerror}); make room",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not _lost_another(error):
            launch.let_first_speak()
            raise
        time.sleep(launch.GRACE)  # that one has its own error to show, and the launcher ends this one
        sys.exit("错误 error: 另一个进程退出了 another process ended; its error, if it had time for one, is above")


def _lost_another(error):
    """Whether `error` only says that another process is gone."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or any(text in str(error) for text in ("closed by peer", "reset by peer"))
