"""A program starts itself once more with huge pages, where they are there and help."""

import os
import subprocess
import sys

import pytest

from igpt import huge_pages

PROGRAM = """
from igpt import huge_pages
huge_pages.are_useful = lambda argv: {useful}
huge_pages.ask_for_huge_pages()
import os, sys
print(huge_pages.in_use(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"))
"""


def run(useful, *words, **variables):
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | variables
    command = [sys.executable, "-c", PROGRAM.format(useful=useful), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_program_starts_itself_once_more_with_the_same_words():
    assert run(True, "--a=b c", "d") == "True ['--a=b c', 'd'] glibc.malloc.hugetlb=1"
    assert run(False, "d") == "False ['d'] None"


def test_other_tunables_are_kept():
    others = "glibc.malloc.arena_max=2"
    assert run(True, GLIBC_TUNABLES=others) == f"True [] {others}:glibc.malloc.hugetlb=1"


@pytest.fixture
def linux(monkeypatch, tmp_path):
    """A Linux machine with a CPU alone, whose system gives huge pages on request."""
    monkeypatch.setattr(huge_pages, "SWITCH", tmp_path / "enabled")
    monkeypatch.setattr(huge_pages, "ACCELERATORS", ("no-such-device",))
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    return tmp_path / "enabled"


def test_huge_pages_are_useful_on_a_cpu_with_linux_and_a_new_glibc(linux):
    assert huge_pages.are_useful(["train.py", "--workdir=x"])


@pytest.mark.parametrize("words", [["--huge_pages=off"], ["--huge_pages", "off"]])
def test_a_flag_turns_huge_pages_off(linux, words):
    assert not huge_pages.are_useful(["train.py", *words])


def test_huge_pages_are_left_alone_where_they_do_not_help(linux, monkeypatch):
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.31")
    assert not huge_pages.are_useful([])
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36")
    linux.write_text("[always] madvise never\n")
    assert not huge_pages.are_useful([])
    linux.unlink()
    assert not huge_pages.are_useful([])


def test_huge_pages_are_left_alone_beside_an_accelerator(linux, monkeypatch):
    monkeypatch.setattr(huge_pages, "ACCELERATORS", ("null",))
    assert not huge_pages.are_useful([])
    monkeypatch.setattr(huge_pages, "ACCELERATORS", ())
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert not huge_pages.are_useful([])
