"""Errors that are the user's to mend, and how a command reports them."""

import contextlib
import os
import sys


class UserError(Exception):
    """A mistake in an input. The message says what was given, what is allowed and what to do."""

    exit_code = 2
    label = "error"  # what its message begins with


class NonFiniteError(UserError):
    """Training diverged: the loss or the gradient norm is no longer a finite number."""

    exit_code = 1


@contextlib.contextmanager
def reported():
    """Turns a `UserError` into one message on stderr and its exit code, without a traceback."""
    try:
        yield
    except UserError as error:
        print(f"{error.label}: {error}", file=sys.stderr)
        _leave(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # what a shell reports for SIGINT


def _leave(code: int) -> None:
    """Exits. One of several processes that failed does not wait for the others' farewell, to which they cannot come."""
    jax = sys.modules.get("jax")
    if code < 75 and jax and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
