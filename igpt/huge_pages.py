"""Asks Linux for memory in pages of 2 MiB, which makes training on CPUs faster.

XLA returns the memory of a step to the system after each step, and gets it anew in pages of 4 KiB: 55,000 a step for
the digits at batch 64, a quarter of the processor time. glibc can ask for pages of 2 MiB, but only if a variable is set
before Python starts. Therefore train.py starts itself once more, before its slow imports.
"""

import itertools
import os
import sys
from pathlib import Path

FLAG = "--huge_pages"
TUNABLE = "glibc.malloc.hugetlb"
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ACCELERATORS = ("nvidiactl", "kfd", "accel0", "vfio/0")  # in /dev: then the CPU does not compute


def ask_for_huge_pages() -> None:
    """Starts this program again with huge pages if they are there, help, and are not yet used. `=off` prevents it."""
    if not in_use() and are_useful(sys.argv):
        others = os.environ.get("GLIBC_TUNABLES")
        tunables = f"{others}:{TUNABLE}=1" if others else f"{TUNABLE}=1"
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"GLIBC_TUNABLES": tunables})


def in_use() -> bool:
    """Whether this process was started with huge pages."""
    return TUNABLE in os.environ.get("GLIBC_TUNABLES", "")


def are_useful(argv: list[str]) -> bool:
    """Whether this machine computes on the CPU, its system gives huge pages on request, and no flag turns them off."""
    words = " ".join(argv).replace("=", " ").split()
    if (FLAG, "off") in itertools.pairwise(words):
        return False
    if os.environ.get("JAX_PLATFORMS", "cpu") != "cpu" or any(Path("/dev", name).exists() for name in ACCELERATORS):
        return False
    try:
        version = os.confstr("CS_GNU_LIBC_VERSION").split()[1]  # "glibc 2.36"
        return "[madvise]" in SWITCH.read_text() and tuple(map(int, version.split("."))) >= (2, 35)
    except (OSError, ValueError, AttributeError, IndexError):  # another system, or another C library
        return False
