"""Shows the progress of long work: a bar on a terminal and in a notebook, a plain line a minute in a log file."""

import contextlib
import importlib.util
import io
import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 60


class LogLines(io.TextIOBase):
    """A text file for tqdm. It turns every state of the bar into a line with date and time on stderr."""

    def write(self, text: str) -> int:
        if state := text.strip("\r\n "):  # tqdm also writes blanks, to erase the bar
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {state}", file=sys.stderr, flush=True)
        return len(text)


def progress_bar(*iterable, **options) -> tqdm:
    """Returns a tqdm bar with the given options. In a log file it shows count, time, speed and postfix, and no bar.

    Work of less than a minute leaves no line there. Set the postfix with refresh=False, or each change becomes a line.
    """
    if "ipykernel" in sys.modules:
        return notebook_bar()(*iterable, dynamic_ncols=True, **options)
    if sys.stderr.isatty():
        return tqdm(*iterable, dynamic_ncols=True, **options)
    calm = dict.fromkeys(("mininterval", "maxinterval", "delay"), SECONDS_BETWEEN_LINES) | dict(miniters=1)
    if "bar_format" in options:
        options["bar_format"] = options["bar_format"].replace("|{bar}|", "")
    else:
        calm["ncols"] = 0  # tqdm's own format, without the bar
    bar = tqdm(*iterable, file=LogLines(), **calm, **options)
    bar.said_at = -SECONDS_BETWEEN_LINES  # when `doing` wrote a line
    return bar


@contextlib.contextmanager
def doing(bar: tqdm, what: str):
    """Shows before the bar what the block does, such as "saving". A log file says so once a minute at most."""
    bar.set_description_str(f"{what}: ", refresh=False)
    now, said_at = time.monotonic(), getattr(bar, "said_at", None)  # None: not in a log file
    if said_at is None:
        bar.refresh()
    elif now - said_at >= SECONDS_BETWEEN_LINES:
        bar.said_at = now
        bar.refresh()
    try:
        yield
    finally:
        bar.set_description_str("", refresh=False)


def notebook_bar() -> type[tqdm]:
    """tqdm's widget if ipywidgets is installed, else its line of text. tqdm.auto chooses likewise, but warns."""
    if importlib.util.find_spec("ipywidgets") is None:
        return tqdm
    from tqdm.notebook import tqdm as widget

    return widget
