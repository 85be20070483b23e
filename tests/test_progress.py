"""Progress is a bar on a terminal, and a plain line a minute in a log file."""

import re
import sys

import pytest

from igpt import progress


@pytest.fixture
def seconds(monkeypatch):
    """The clock of tqdm, which the test moves."""
    now = [1000.0]
    monkeypatch.setattr(progress.tqdm, "monitor_interval", 0)  # no thread that looks at the real clock
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def run(seconds, steps, of_each):
    with progress.progress_bar(total=steps, unit="step", initial=0) as bar:
        for step in range(steps):
            seconds[0] += of_each
            bar.set_postfix_str(f"loss {step / 10}", refresh=False)
            bar.update()


def test_a_log_file_gets_a_plain_line_a_minute(seconds, capsys):
    run(seconds, steps=1000, of_each=0.5)
    lines = capsys.readouterr().err.splitlines()
    assert 8 <= len(lines) <= 10, lines
    state = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d .*\d+/1000 \[.*step/s, loss [\d.]+\]"
    assert all(re.fullmatch(state, line) for line in lines)


def test_short_work_leaves_no_line_in_a_log_file(seconds, capsys):
    run(seconds, steps=100, of_each=0.5)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(seconds, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(seconds, steps=10, of_each=1.0)
    assert "\r" in capsys.readouterr().err


def test_a_log_file_is_told_once_a_minute_at_most_what_goes_on(seconds, capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress_bar(total=9, bar_format="{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}") as bar:
        for what in ("compiling", "evaluating", "saving"):
            now[0] += 40.0
            with progress.doing(bar, what):
                pass
    lines = [line[20:] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["compiling:   0% 0/9", "saving:   0% 0/9"]


def test_a_notebook_without_widgets_gets_a_bar_of_text_and_no_warning(seconds, capsys, monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run(seconds, steps=10, of_each=1.0)
    assert "\r" in capsys.readouterr().err and not recwarn.list


def test_a_notebook_with_widgets_gets_one(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    from tqdm.notebook import tqdm_notebook

    assert progress.notebook_bar() is tqdm_notebook
