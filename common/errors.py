"""How a user's mistake is reported: one line on stderr and exit code 2."""

import argparse
import errno
import functools
import io
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, over quota, over the largest file allowed
# What torch, CUDA's libraries and the system's threads write when memory runs out but the exception's class is general.
OUT_OF_MEMORY = (
    "allocate memory",
    "not enough memory",
    "out of memory",
    "memoryallocation",
    "alloc_failed",
    "std::bad_alloc",
    "memory object",  # oneDNN: "could not create a memory object"
    "can't start new thread",
    "failed to map segment",  # of a library that is imported late
)


class UserError(ValueError):
    """A mistake in the user's input: the message says what was given, what was expected and what to change."""


class OutOfMemory(UserError):
    """The machine or its GPU has too little memory: the message names the flags that lower the need."""


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong command line like any other mistake, and accepts no abbreviated flags."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` instead of printing the usage."""
        raise UserError(f"{message} (--help lists the flags)")


def print_once(line: str) -> None:
    """Print a line on stderr, once per machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr)


def print_from_other_ranks(error: UserError, rank: int | str) -> None:
    """Print an error with its rank, unless this is the first process of its machine: that one prints on its exit."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        print(f"error: [process {rank}] {error}", file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank; without a message, the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def unknown_name(kind: str, name: str, known: Iterable[str], flag: str = "") -> UserError:
    """The error of a name that is not one of the `known` ones; it lists them, and the flag to change."""
    return UserError(f"unknown {kind} {name!r}: choose one of {', '.join(known)}{f' ({flag})' if flag else ''}")


def require_known(kind: str, name: str, known: Collection[str], flag: str = "") -> None:
    """Raise `unknown_name` unless `name` is one of the `known` ones."""
    if name not in known:
        raise unknown_name(kind, name, known, flag)


def out_of_memory_reason(error: BaseException) -> str | None:
    """The line of an error that reports a lack of memory, on the machine or a GPU; None for any other error."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, raised by CUDA
        return first_line(error)
    if isinstance(error, OSError):
        return first_line(error) if error.errno == errno.ENOMEM else None
    if isinstance(error, RuntimeError | ImportError):
        return next(
            (line for line in str(error).splitlines() if any(words in line.lower() for words in OUT_OF_MEMORY)),
            None,
        )
    return None


@contextmanager
def reports_out_of_memory(advice: str) -> Iterator[None]:
    """Around a command's work, or as its decorator: a lack of memory becomes an `OutOfMemory` with `advice`.

    This includes a `UserError` with a lack of memory as its cause, for example a file that could not be read for lack
    of memory. Every rank prints the error, as it may be the only rank without memory.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, UserError) else error
        if cause is None or (reason := out_of_memory_reason(cause)) is None:
            raise
        out_of_memory = OutOfMemory(f"out of memory ({reason}): {advice}")
        print_from_other_ranks(out_of_memory, os.environ.get("RANK") or os.environ.get("LOCAL_RANK", "0"))
        raise out_of_memory from error


@contextmanager
def warn_if_not_drawn(picture: str, reraised: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Around the drawing of a picture, for which finished work must not fail: errors not in `reraised` only warn."""
    try:
        yield
    except reraised:
        raise
    except Exception as error:  # drawing libraries raise all kinds
        print_once(f"warning: {picture} could not be drawn ({first_line(error)})")


def exits_on_user_error(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a command's `main`: a mistake becomes one line on stderr and exit code 2, without a traceback.

    A mistake is a `UserError`, an `OSError` that names the file it could not open or write, or a full disk (whose
    `OSError` may name no file). Only the first process of each machine prints, so that a mistake is not repeated once
    per GPU. An interrupt (Ctrl-C) is one line as well. Characters of file names that the output's encoding lacks are
    printed as backslash escapes.
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
            print_once(f"error: {error}".replace("\n", "\\n"))  # a file name may hold a line break
            sys.exit(2)
        except KeyboardInterrupt:
            # One line in place of the traceback; still raised, so that a shell script or loop stops too.
            sys.excepthook = lambda *_: print_once("interrupted")
            raise

    return wrapped
