"""Errors a user can act on: one line that says what, where and how to mend it."""

import errno
import sys


class UserError(Exception):
    """Something the user can put right. Its text is one line: Chinese first, then the key facts in English."""

    exit_code = 1


def run_main(main):
    """Call `main()` as a script: a UserError or a full disk becomes one line on stderr, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
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
