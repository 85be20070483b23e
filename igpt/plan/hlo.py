"""Reads a compiled program's HLO text: its collectives, its kernels and the TPU compiler's cycle estimates.

The text contains the body of a loop once. This module counts its instructions as often as the loop runs. It counts all
branches of a conditional, so the results are upper bounds.
"""

import math
import re
from collections import Counter, defaultdict
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")  # name, shape, opcode
CALLED = re.compile(r"(?:calls|to_apply|body|(?:branch|true|false)_computations?)=(\{[^}]*\}|[^,\s]+)")


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    line: str


class HloProgram:
    """A module of HLO text: its computations, and how often each of them runs when the program runs once.

    Iterating yields (instruction, number of runs). `uncounted` has the names of loops whose number of iterations is
    not in the text. These are counted as one iteration.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        entry, instructions = None, None
        for line in text.splitlines():
            if heading := COMPUTATION.match(line):
                instructions = self.computations[heading[2]] = []
                entry = heading[2] if heading[1] else entry
            elif instructions is not None and (found := INSTRUCTION.match(line)):
                instructions.append(Instruction(*found.groups(), line))
        self.times, self.uncounted = Counter(), set()
        self._count(entry, 1)

    def _count(self, name: str, times: int) -> None:
        self.times[name] += times
        for instruction in self.computations[name]:
            iterations = self._iterations(instruction) if instruction.opcode == "while" else 1
            for names in CALLED.findall(instruction.line):
                for called in re.findall(r"[\w.\-]+", names):
                    if called in self.computations:
                        self._count(called, times * iterations)

    def _iterations(self, loop: Instruction) -> int:
        """The number of iterations of a loop: from the compiler's note, or the constant that ends the loop."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line):
            return int(known[1])
        condition = self.computations[re.search(r"condition=%?([\w.\-]+)", loop.line)[1]]
        constants = [re.search(r"constant\((\d+)\)", other.line) for other in condition if other.opcode == "constant"]
        if len(constants) == 1 and constants[0]:
            return int(constants[0][1])
        self.uncounted.add(loop.name)
        return 1

    def __iter__(self):
        for name, times in self.times.items():
            for instruction in self.computations[name]:
                yield instruction, times

    def collectives(self) -> dict[str, dict]:
        """Returns {kind: {"count", "bytes"}}: the number of runs, and the bytes of their results on one device.

        The bytes of a reduce-scatter are its size before scattering. An all-to-all has the bytes of its whole group.

        On TPUs, a reduce-scatter is a fusion named all-reduce-scatter: an all-reduce and a slice of its result. An
        asynchronous collective is a chain of fusions: the start, the products that run at the same time, and the end.
        Each fusion of a chain repeats the collective and its channel, so only the first is counted.
        """
        found, chains = defaultdict(Counter), set()
        for name, times in self.times.items():
            for instruction in self.computations[name]:
                kind = instruction.opcode.removesuffix("-start")
                if kind in COLLECTIVES:
                    if chain := re.search(r"channel_id=(\d+).*\bchain_id=", instruction.line):
                        if chain[1] in chains:
                            continue
                        chains.add(chain[1])
                    size = _result_bytes(instruction)
                    if kind in ("reduce-scatter", "all-to-all"):
                        size *= _group_size(instruction.line)
                    elif name.startswith("all-reduce-scatter"):
                        kind = "reduce-scatter"
                    found[kind].update(count=times, bytes=times * size)
        return found

    def between_slices(self) -> dict[str, dict]:
        """Returns {kind of transfer: {"count", "bytes"}} between TPU slices; "bytes" is what one device sends."""
        found = defaultdict(Counter)
        for instruction, times in self:
            kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.line)
            if kind and instruction.opcode == "send":
                size = _sizes(instruction.shape)[0]  # the shape also has a counter and a token
                found[kind[1].lower().replace("_", "-")].update(count=times, bytes=times * size)
        return found

    def kernels(self) -> Counter:
        """Returns {name: number of runs} of the custom TPU kernels. Numbers at the end of names are removed."""
        found = Counter()
        for instruction, times in self:
            if 'custom_call_target="tpu_custom_call"' in instruction.line:
                found[re.sub(r"[.\d]+$", "", instruction.name)] += times
        return found

    def cycles(self) -> int:
        """Sums the compiler's cycle estimates. The compiler makes none for custom kernels."""
        return sum(times * int(n) for one, times in self for n in re.findall(r'"estimated_cycles":"(\d+)"', one.line))


def _result_bytes(instruction: Instruction) -> int:
    """Bytes of the result. The shape of an asynchronous start has operands, results, and for a permute two counters."""
    sizes = _sizes(instruction.shape)
    if instruction.opcode not in ("all-gather-start", "collective-permute-start"):
        return sum(sizes)
    if instruction.opcode == "collective-permute-start" and len(sizes) > 2:
        sizes = sizes[:-2]
    return sum(sizes[len(sizes) // 2 :])


def _sizes(shape: str) -> list[int]:
    """Bytes of each array in a shape. A type's name ends in its number of bits, except pred, which takes one byte."""
    return [
        max(int(bits or 8) // 8, 1) * math.prod(int(side) for side in sides.split(",") if side)
        for bits, sides in re.findall(r"\b[a-z]+(\d*)\[([\d,]*)\]", shape)
    ]


def _group_size(line: str) -> int:
    """Devices per group. `replica_groups` lists all groups, {{0,1},{2,3}}, or [number of groups, size], [2,2]<=[4]."""
    found = re.search(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\})", line)
    if found is None:
        return 1
    return int(found[1]) if found[1] else found[2].count(",") + 1
