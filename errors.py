"""The one way a user's mistake is reported: a single line on stderr and exit code 2."""

import argparse
import errno
import functools
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, over quota, over the largest file allowed


class UserError(ValueError):
    """A mistake in what the user gave: the message says what was given, what was expected, what to change."""


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong command line as every other mistake, and does not guess abbreviated flags."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` in place of printing the usage."""
        raise UserError(f"{message} (--help lists the flags)")


def tell(line: str) -> None:
    """Print a line on stderr, once a machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr)


def exits_on_user_error(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a command's `main`: a mistake becomes one line on stderr and exit code 2, without a traceback.

    A mistake is a `UserError`, or a file that the system would not open or write (its error names the file), or a full
    disk (the error of a write names none). Only the first process of each machine prints, so that a mistake is not
    repeated once per GPU. An interrupt (Ctrl-C) is one line as well. Names of files that the output's encoding lacks
    are printed with backslashes.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            main()
        except (UserError, OSError) as error:
            if isinstance(error, OSError):
                if error.filename is None and error.errno not in DISK_FULL:
                    raise
                error = f"{error.filename or 'cannot write'}: {error.strerror}"
            tell(f"error: {error}".replace("\n", "\\n"))  # in the name of a file
            sys.exit(2)
        except KeyboardInterrupt:
            # The traceback gives way to a line, but it stays an interrupt, by which a shell's script or loop stops too.
            sys.excepthook = lambda *_: tell("interrupted")
            raise

    return wrapped
