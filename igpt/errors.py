"""Errors that are the user's to mend, and how a command reports them."""

import contextlib
import sys


class UserError(Exception):
    """A mistake in an input. The message says what was given, what is allowed and what to do."""

    exit_code = 2


class NonFiniteError(UserError):
    """Training diverged: the loss or the gradient norm is no longer a finite number."""

    exit_code = 1


@contextlib.contextmanager
def reported():
    """Turns a `UserError` into one message on stderr and its exit code, without a traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # what a shell reports for SIGINT
