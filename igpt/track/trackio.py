"""trackio, a tracker that needs no account: a database on the local disk, where `trackio show` finds it.

Its settings come from its own environment variables, such as TRACKIO_DIR and TRACKIO_SPACE_ID.
"""

import contextlib
import io
from pathlib import Path

import trackio

from igpt.files import AnyPath, is_bucket

PROJECT = "igpt"


class Trackio:
    """One run of trackio. A resumed run has the name of its first start, and therefore continues the same record."""

    def __init__(self, folder: AnyPath, config: dict, kind: str, identity: str):
        # A run's name identifies it, and folders of different machines may have the same name. The name does not depend
        # on whether a command gives the folder's whole path.
        folder = folder if is_bucket(folder) else Path(folder).absolute()
        name = f"{folder.parent.name}-{folder.name}-{identity}"
        config = {field: x if isinstance(x, bool | int | float) else str(x) for field, x in config.items()}
        with contextlib.redirect_stdout(io.StringIO()):  # several lines of advice
            self.run = trackio.init(PROJECT, name=name, group=kind, config=config, resume="allow", embed=False)

    def scalars(self, step: int, values: dict) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, picture) -> None:
        self.scalars(step, {name: trackio.Image(picture)})

    def summary(self, step: int, values: dict[str, float]) -> None:
        self.scalars(step, values)

    def flush(self) -> None:
        """Does nothing: trackio's own thread writes every half second."""

    def close(self, failed: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()
