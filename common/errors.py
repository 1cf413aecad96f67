"""The one way a user's mistake is reported: a single line on stderr and exit code 2."""

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
# How torch, CUDA's libraries and the system's threads say that memory is used up, where no class of errors says it.
NO_MEMORY = (
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
    """A mistake in what the user gave: the message says what was given, what was expected, what to change."""


class OutOfMemory(UserError):
    """The memory of the machine or its GPU does not suffice: the message names the flags that need less."""


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


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def unknown_name(kind: str, name: str, known: Iterable[str], flag: str = "") -> UserError:
    """The error of a name that is not one of the `known` ones; it lists them, and the flag to change."""
    return UserError(f"unknown {kind} {name!r}: choose one of {', '.join(known)}{f' ({flag})' if flag else ''}")


def require_known(kind: str, name: str, known: Collection[str], flag: str = "") -> None:
    """Raise `unknown_name` unless `name` is one of the `known` ones."""
    if name not in known:
        raise unknown_name(kind, name, known, flag)


def lack_of_memory(error: BaseException) -> str | None:
    """The line of an error that says that memory, the machine's or a GPU's, is used up; None for any other error."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, of which CUDA raises
        return first_line(error)
    if isinstance(error, OSError):
        return first_line(error) if error.errno == errno.ENOMEM else None
    if isinstance(error, RuntimeError | ImportError):
        return next(
            (line for line in str(error).splitlines() if any(words in line.lower() for words in NO_MEMORY)), None
        )
    return None


@contextmanager
def memory_told(advice: str) -> Iterator[None]:
    """Around a command's work, or as its decorator: memory that is used up becomes an `OutOfMemory` with `advice`.

    So does a mistake that only looks like one, a file that could not be read for want of memory. Every process tells,
    as it may be the only one whose memory is used up.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, UserError) else error
        if cause is None or (reason := lack_of_memory(cause)) is None:
            raise
        told = OutOfMemory(f"out of memory ({reason}): {advice}")
        if (rank := os.environ.get("LOCAL_RANK", "0")) != "0":
            print(f"error: [process {os.environ.get('RANK', rank)}] {told}", file=sys.stderr, flush=True)
        raise told from error


@contextmanager
def spared_by(picture: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Around a picture, which is no reason for finished work to fail: an error is one warning, unless `passing`."""
    try:
        yield
    except passing:
        raise
    except Exception as error:  # libraries that draw raise all kinds
        tell(f"warning: {picture} could not be drawn ({first_line(error)})")


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
