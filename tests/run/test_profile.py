"""Which steps the profiler records."""

import jax
import pytest

from igpt.run.profile import Profile


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: made.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append("stop"))
    return made


def run_steps(profile, steps, calls):
    for step in steps:
        profile.before(step)
        calls.append(step)
        profile.after(step, None)


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (0, 6, [1, 2, 3, 4, 5, 6]),
        (2, 6, [1, "start", 2, 3, 4, "stop", 5, 6]),
        (5, 6, [1, 2, 3, 4, "start", 5, 6, "stop"]),
        (9, 6, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_three_steps_are_recorded_or_those_that_are_left(tmp_path, calls, first, last, expected):
    with Profile(tmp_path, first, last) as profile:
        run_steps(profile, range(1, 7), calls)
    assert calls == expected


def test_an_interrupted_recording_is_closed(tmp_path, calls):
    with pytest.raises(ZeroDivisionError), Profile(tmp_path, 1, 9) as profile:
        run_steps(profile, (1, 2), calls)
        raise ZeroDivisionError
    assert calls == ["start", 1, 2, "stop"]
