"""Reads the bundles that the TPU compiler dumps: the instructions of each operation, one bundle a cycle.

A TPU core issues one bundle of instructions a cycle. The compiler writes the final bundles of every operation into a
file. A bundle in a loop is marked with one ">" for each loop around it. The compiler orders them so that results are
ready when they are needed. So the number of bundles is the number of cycles, unless the memory is slower.
"""

import re
import shutil
from collections import Counter
from pathlib import Path

FILE = re.compile(r"^\d+-(?P<operation>.+)-\d+-final_bundles\.txt$")
BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|\d+)\s+(?:[A-Z]{2})?\s*:(?P<loops>(?:\s*>)*)", re.MULTILINE)


def dump_flags(folder: Path) -> str:
    """Flags for LIBTPU_INIT_ARGS that let the compiler write its bundles, and little else, into a folder."""
    only_final = "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true {only_final}"


def take_bundles(folder: Path) -> dict[str, Counter]:
    """Returns {operation: {loops around: bundles}} and empties the folder for the next program."""
    found = {}
    for path in folder.glob("*-final_bundles.txt"):
        name = FILE.match(path.name)
        if name and "schedule-analysis" not in path.name:
            found[name["operation"]] = count_bundles(path.read_text())
    shutil.rmtree(folder, ignore_errors=True)  # the next program makes it anew
    return found


def count_bundles(text: str) -> Counter:
    return Counter(match["loops"].count(">") for match in BUNDLE.finditer(text))
