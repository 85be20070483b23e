"""Errors that the user can correct, and how a command reports them."""

import contextlib
import errno
import io
import os
import sys
import traceback

UNUSABLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)  # of a path: the user named another than meant
PREEMPTED = 75  # exit code of every process of a preempted run; EX_TEMPFAIL of sysexits.h, "try again later"


def end_at_sigterm(*_) -> None:
    """Handles SIGTERM while a run has nothing to save: ends at once, with the code PREEMPTED.

    An exception could be taken for one of the work that it interrupts.
    """
    os.write(2, b"stopped: SIGTERM came; the same command goes on from what is saved\n")
    os._exit(PREEMPTED)


class UserError(Exception):
    """A mistake in an input. The message says what was given, what is allowed and what to do."""

    exit_code = 2
    label = "error"  # the first word of the printed message


class NonFiniteError(UserError):
    """Training diverged: the loss or the gradient norm is not a finite number."""

    exit_code = 1


class StorageError(UserError):
    """A disk is full, or a file on it cannot be read or written any more."""

    exit_code = 1


class UnreadableProgramError(UserError):
    """The compiler failed at a program, or its text cannot be read, so that nothing is known of its speed."""


class MissingProcessError(UserError):
    """Some processes of a run did not connect to process 0."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of the error's type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def reported():
    """Prints a `UserError` as one message on stderr, without a traceback, and exits with the error's `exit_code`.

    What stdout cannot encode, such as a file's name that is no UTF-8, is printed as escape sequences.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        with contextlib.suppress(OSError):  # stderr may be a file on a full disk
            print(f"{error.label}: {error}", file=sys.stderr)
        _exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _exit(130)  # the exit code that shells report for SIGINT
    except BrokenPipeError:  # whoever read the output has left, as in `igpt evaluate ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes stdout
        _exit(141)  # the exit code that shells report for SIGPIPE
    except OSError as error:
        if error.errno not in UNUSABLE or not error.filename:
            _defect()
        with contextlib.suppress(OSError):
            print(f"error: {error.filename}: {error.strerror}; name another place", file=sys.stderr)
        _exit(2)
    except Exception:
        _defect()


def _defect() -> None:
    """Ends with the traceback of the exception that is being handled."""
    if not _is_one_of_several():
        raise
    with contextlib.suppress(OSError):
        traceback.print_exc()
    _exit(1)


def _is_one_of_several() -> bool:
    jax = sys.modules.get("jax")
    return bool(jax and jax.distributed.is_initialized())


def _exit(code: int) -> None:
    """Exits. If one of several processes failed, it calls os._exit: sys.exit would wait at JAX's shutdown barrier."""
    if code != PREEMPTED and _is_one_of_several():
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
