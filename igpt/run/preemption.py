"""SIGTERM, which schedulers and clouds send before they take a machine away: heard now, obeyed at a good moment."""

import signal
import threading

import jax
from jax.experimental import multihost_utils

from igpt.errors import PREEMPTED, UserError


class PreemptedError(UserError):
    """A run was asked to stop; it has been saved and can be continued."""

    exit_code = PREEMPTED
    label = "stopped"


class StopSignal:
    """Within `with`, SIGTERM does not end the process but makes `requested()` true; a second one ends it.

    Of several processes one signal suffices. JAX's runtime hears it then, on whichever host, and names a check that
    all have still before them: all have to call `requested()` equally often.
    """

    def __enter__(self):
        self._heard, self._checks, self._previous = False, 0, None
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *_):
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _hear(self, *_):
        self._heard = True
        signal.signal(signal.SIGTERM, self._previous)

    def requested(self) -> bool:
        if jax.process_count() > 1 and not self._heard:
            self._checks += 1
            self._heard = multihost_utils.reached_preemption_sync_point(self._checks)
        return self._heard
