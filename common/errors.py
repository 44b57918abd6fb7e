"""Errors a user can act on: one line that says what, where and how to mend it."""

import sys


class UserError(Exception):
    """Something the user can put right. Its text is one line: Chinese first, then the key facts in English."""

    exit_code = 1


def run_main(main):
    """Call `main()` as a script: a UserError becomes one line on stderr and its exit code, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"错误 error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
