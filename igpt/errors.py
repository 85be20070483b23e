"""Errors that are the user's to mend, and how a command reports them."""

import contextlib
import os
import sys
import traceback

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later; all processes of a run end so together


class UserError(Exception):
    """A mistake in an input. The message says what was given, what is allowed and what to do."""

    exit_code = 2
    label = "error"  # what its message begins with


class NonFiniteError(UserError):
    """Training diverged: the loss or the gradient norm is no longer a finite number."""

    exit_code = 1


class StorageError(UserError):
    """The disk is full, or cannot be written or read any more."""

    exit_code = 1


def first_line(error: Exception) -> str:
    """The first line of an error's message; the name of its type where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def reported():
    """Turns a `UserError` into one message on stderr and its exit code, without a traceback."""
    try:
        yield
    except UserError as error:
        with contextlib.suppress(OSError):  # a full disk may hold the log, too
            print(f"{error.label}: {error}", file=sys.stderr)
        _leave(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _leave(130)  # what a shell reports for SIGINT
    except Exception:
        if not _one_of_several():
            raise
        with contextlib.suppress(OSError):
            traceback.print_exc()
        _leave(1)


def _one_of_several() -> bool:
    jax = sys.modules.get("jax")
    return bool(jax and jax.distributed.is_initialized())


def _leave(code: int) -> None:
    """Exits. One of several processes that failed does not wait for the others' farewell, to which they cannot come."""
    if code != PREEMPTED and _one_of_several():
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
