"""Errors that the user can correct, and how a command reports them."""

import contextlib
import os
import sys
import traceback

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h, "try again later"; every process of a run ends with it


class UserError(Exception):
    """A mistake in an input. The message says what was given, what is allowed and what to do."""

    exit_code = 2
    label = "error"  # the first word of the printed message


class NonFiniteError(UserError):
    """Training diverged: the loss or the gradient norm is not a finite number."""

    exit_code = 1


class StorageError(UserError):
    """A disk is full, or cannot be read or written any more."""

    exit_code = 1


class MissingProcessError(UserError):
    """Not all processes of a run came together."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def reported():
    """Prints a `UserError` as one message on stderr, without a traceback, and exits with its code."""
    try:
        yield
    except UserError as error:
        with contextlib.suppress(OSError):  # a full disk may also hold the log
            print(f"{error.label}: {error}", file=sys.stderr)
        _exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _exit(130)  # what a shell reports for SIGINT
    except Exception:
        if not _is_one_of_several():
            raise
        with contextlib.suppress(OSError):
            traceback.print_exc()
        _exit(1)


def _is_one_of_several() -> bool:
    jax = sys.modules.get("jax")
    return bool(jax and jax.distributed.is_initialized())


def _exit(code: int) -> None:
    """Exits. If one of several processes failed: with os._exit, since a normal exit waits in JAX's shutdown barrier."""
    if code != PREEMPTED and _is_one_of_several():
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
