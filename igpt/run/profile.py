"""Records a few steps of a run with JAX's profiler, for TensorBoard or XProf."""

import jax

from igpt.files import AnyPath
from igpt.track.live import LiveFiles


class Profile:
    """Records the steps first, first + 1 and first + 2 into WORKDIR/profile. If `first` is 0, it records no step."""

    STEPS = 3

    def __init__(self, workdir: AnyPath, first: int, last_step: int):
        self.folder, self.first, self.last = workdir / "profile", first, min(first + self.STEPS - 1, last_step)
        self.is_running = False

    def before(self, step: int) -> None:
        """Starts the recording if `step` is the first recorded step."""
        if step == self.first:
            self.live = LiveFiles(self.folder)
            jax.profiler.start_trace(self.live.folder)
            self.is_running = True

    def after(self, step: int, state) -> None:
        """Ends the recording if `step` is the last recorded step."""
        if self.is_running and step == self.last:
            jax.block_until_ready(state)
            self.__exit__()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.is_running:
            jax.profiler.stop_trace()
            self.live.close()
            self.is_running = False
