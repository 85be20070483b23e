"""SIGTERM, which schedulers and clouds send before they take a machine away: noticed at once, obeyed between steps."""

import signal
import threading

import jax
from jax.experimental import multihost_utils

from igpt.errors import PREEMPTED, UserError


class PreemptedError(UserError):
    """A run was asked to stop. It is saved and can be resumed."""

    exit_code = PREEMPTED
    label = "stopped"


class StopSignal:
    """Within `with`, the first SIGTERM makes `requested()` true; a second one ends the process.

    Of several processes, one signal to any of them is enough. JAX's runtime receives it and chooses a later call of
    `requested()` at which all processes return true; so all must call it equally often.
    """

    def __enter__(self):
        self._received, self._calls, self._previous = False, 0, None
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_):
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _receive(self, *_):
        self._received = True
        signal.signal(signal.SIGTERM, self._previous)

    def requested(self) -> bool:
        """Whether the run should save and stop now."""
        if jax.process_count() > 1 and not self._received:
            self._calls += 1
            self._received = multihost_utils.reached_preemption_sync_point(self._calls)
        return self._received
