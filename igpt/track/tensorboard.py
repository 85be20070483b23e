"""TensorBoard's event files, written by tensorboardX without torch and without a thread.

tensorboardX imports torch if it is installed, only to know its tensors. That takes seconds, so torch is hidden from it.
"""

import sys
import time
from pathlib import Path

_hides_torch = "torch" not in sys.modules
if _hides_torch:
    sys.modules["torch"] = None  # an import of torch raises ImportError, which tensorboardX expects
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import hparams, image, scalar
finally:
    if _hides_torch:
        del sys.modules["torch"]

FLUSH_SECONDS = 30  # how often events are flushed to disk
# The columns of TensorBoard's table of hyper-parameters. A run fills those that it has.
RESULTS = ("train/loss", "eval/loss", "eval/bits_per_dim", "eval/accuracy", "test/accuracy", "probe/accuracy")


class TensorBoard:
    """Writes DIR/events.*, a new file at every start. It raises OSError at once if the file cannot be written.

    The calling thread writes: the thread of tensorboardX's SummaryWriter would fail silently on a full disk.
    """

    def __init__(self, folder: Path, config: dict, after: int):
        """Writes the hyper-parameters, and hides the events of steps beyond `after` that an earlier start wrote."""
        # The writer names its file by the second. Two starts in one second must not share a file, in a bucket either,
        # whose earlier files are not in `folder`. TensorBoard reads files in the order of their names.
        self.events = EventsWriter(str(folder / "events"), f".{time.time_ns() % 10**9:09d}")
        self.flush_at = 0.0
        self._write(after + 1, session_log=SessionLog(status=SessionLog.START))
        plain = {name: x if isinstance(x, bool | int | float | str) else str(x) for name, x in config.items()}
        experiment, started, self.ended = hparams(plain, dict.fromkeys(RESULTS))
        self._write(0, summary=experiment)
        self._write(0, summary=started)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._write(step, summary=scalar(name, value))
        if time.monotonic() > self.flush_at:
            self.flush()

    def picture(self, step: int, name: str, picture) -> None:
        self._write(step, summary=image(name, picture, dataformats="HWC"))
        self.flush()

    def summary(self, step: int, values: dict[str, float]) -> None:
        self.scalars(step, values)

    def close(self, failed: bool) -> None:
        """Marks the session as ended, unless it failed, and closes the file."""
        try:
            if not failed:
                self._write(0, summary=self.ended)
        finally:
            self.events.close()

    def _write(self, step: int, **content) -> None:
        self.events.write_event(Event(step=step, wall_time=time.time(), **content))

    def flush(self) -> None:
        self.events.flush()
        self.flush_at = time.monotonic() + FLUSH_SECONDS
