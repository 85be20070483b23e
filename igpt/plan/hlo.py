"""What a compiled program does, read from its HLO text: collectives, kernels, the TPU compiler's own cycle estimates.

An instruction inside a loop counts as often as the loop runs; the text has a loop once, whatever its length. All
branches of a conditional count: what is found is the most that can run.
"""

import itertools
import math
import re
from collections import Counter
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8} | {
    f"{sign}{bits}": max(bits // 8, 1) for sign in "su" for bits in (4, 8, 16, 32, 64)
}
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
CALLED = re.compile(
    r"(?:calls|to_apply|body|branch_computations|true_computation|false_computation)=(\{[^}]*\}|[^,\s]+)"
)


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    line: str


class Program:
    """A module of HLO text: its computations, and how often each runs when the program runs once.

    `uncounted` names the loops whose length the text does not tell; they count once.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        entry, instructions = None, None
        for line in text.splitlines():
            if heading := COMPUTATION.match(line):
                instructions = self.computations[heading[2]] = []
                entry = heading[2] if heading[1] else entry
            elif instructions is not None and " = " in line:
                instructions.append(_instruction(line))
        self.times, self.uncounted = Counter(), set()
        self._count(entry, 1)

    def _count(self, name: str, times: int) -> None:
        self.times[name] += times
        for instruction in self.computations[name]:
            loops = self._trips(instruction) if instruction.opcode == "while" else 1
            for names in CALLED.findall(instruction.line):
                for called in re.findall(r"[\w.\-]+", names):
                    if called in self.computations:
                        self._count(called, times * loops)

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs: what the compiler says, or else the constant that its counter is compared with."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line):
            return int(known[1])
        condition = self.computations[re.search(r"condition=%?([\w.\-]+)", loop.line)[1]]
        constants = [re.search(r"constant\((\d+)\)", other.line) for other in condition if other.opcode == "constant"]
        if len(constants) == 1 and constants[0]:
            return int(constants[0][1])
        self.uncounted.add(loop.name)
        return 1

    def __iter__(self):
        """(instruction, how often it runs)."""
        for name, times in self.times.items():
            for instruction in self.computations[name]:
                yield instruction, times

    def collectives(self) -> dict[str, dict]:
        """By kind: how many run, and the bytes of a device's result.

        Of a reduce-scatter they are those before the scattering, of an all-to-all what its devices hold together.

        The TPU's reduce-scatter is a fusion of an all-reduce, named after both, and a slice of its result. What runs
        beside products is a chain: a start, the products that carry it on, an end. Each names the collective and its
        channel; only the first counts.
        """
        found, chains = {}, set()
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
                    entry = found.setdefault(kind, {"count": 0, "bytes": 0})
                    entry["count"] += times
                    entry["bytes"] += times * size
        return found

    def between_slices(self) -> dict[str, dict]:
        """What the hosts carry from slice to slice, by kind: how often, and the bytes of a device's part."""
        found = {}
        for instruction, times in self:
            kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.line)
            if kind and instruction.opcode == "send":
                entry = found.setdefault(kind[1].lower().replace("_", "-"), {"count": 0, "bytes": 0})
                entry["count"] += times
                entry["bytes"] += times * _sizes(instruction.shape)[0]  # a counter and a token follow
        return found

    def kernels(self) -> Counter:
        """Custom kernels of the TPU by name."""
        found = Counter()
        for instruction, times in self:
            if 'custom_call_target="tpu_custom_call"' in instruction.line:
                found[re.sub(r"[.\d]+$", "", instruction.name)] += times
        return found

    def cycles(self) -> int:
        """The compiler's estimate for the program; it has none for custom kernels."""
        return sum(
            times * int(estimate)
            for instruction, times in self
            for estimate in re.findall(r'"estimated_cycles":"(\d+)"', instruction.line)
        )


def _instruction(line: str) -> Instruction:
    name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
    if rest.startswith("("):
        depths = itertools.accumulate((character == "(") - (character == ")") for character in rest)
        end = next(i for i, depth in enumerate(depths) if depth == 0)
        shape, rest = rest[: end + 1], rest[end + 2 :]
    else:
        shape, rest = rest.split(" ", 1)
    return Instruction(name.lstrip("%"), shape, rest.split("(", 1)[0].strip(), line)


def _result_bytes(instruction: Instruction) -> int:
    """Of the result; the tuple of an asynchronous gathering or permutation holds its operands first, then as many
    results, and a permutation's two counters behind them."""
    sizes = _sizes(instruction.shape)
    if instruction.opcode not in ("all-gather-start", "collective-permute-start"):
        return sum(sizes)
    if instruction.opcode == "collective-permute-start" and len(sizes) > 2:
        sizes = sizes[:-2]
    return sum(sizes[len(sizes) // 2 :])


def _sizes(shape: str) -> list[int]:
    """Bytes of each array of a shape."""
    return [
        BYTES.get(kind, 1) * math.prod(int(side) for side in sides.split(",") if side)
        for kind, sides in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    ]


def _group_size(line: str) -> int:
    """How many devices take part together: replica_groups are listed, {{0,1},{2,3}}, or counted, [2,2]<=[4]."""
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return listed[1].count(",") + 1 if listed else 1
