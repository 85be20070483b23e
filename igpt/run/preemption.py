"""Stops a run between two steps after SIGTERM, which schedulers and clouds send before they take a machine away."""

import signal
import threading

import jax
from jax.experimental import multihost_utils

from igpt.errors import PREEMPTED, UserError


class PreemptedError(UserError):
    """A run stopped because of SIGTERM. The run is saved and can be resumed."""

    exit_code = PREEMPTED
    label = "stopped"


class StopSignal:
    """Inside `with`, the first SIGTERM makes `requested()` return True. A second SIGTERM ends the process.

    With several processes, a signal to one of them is enough. JAX's runtime receives it and chooses a later call of
    `requested()`, which returns True on all processes. Therefore all processes must call `requested()` equally often.
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
