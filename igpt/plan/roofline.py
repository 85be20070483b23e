"""The second estimate of a compiled program: what limits each operation, its instructions, its products or its memory.

The compiler's own cycles (`HloProgram.cycles`) overstate elementwise and layout operations. Here an operation takes as
long as the slowest of three parts, each counted in the compiled program:

- its bundles of instructions (igpt/plan/bundles.py), as often as its loops run;
- its matrix products, at PRODUCT_SHARE of the chip's peak;
- the bytes that it reads from and writes to HBM, at MEMORY_SHARE of the bandwidth.

A kernel takes as long as its bundles. Collectives are not counted here.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from igpt.plan.hlo import COLLECTIVES, HloProgram, Instruction

PRODUCT_SHARE = 0.97  # of the peak: products also fill and empty the systolic arrays
MEMORY_SHARE = 0.83  # of the bandwidth that streaming reaches
ARRAY = re.compile(r"\b([a-z]+)(\d*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")  # type, bits, sides, order, tiles
# Instructions that move nothing themselves: structure, or the ends of something that is counted elsewhere.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
FREE |= {"partition-id", "opt-barrier", "copy-start", "slice-start", "async-start", "async-update"}


class Operation(NamedTuple):
    """An instruction of the program, and the seconds of one run by each of the three limits."""

    name: str
    times: int
    bundles: float
    products: float
    memory: float
    is_kernel: bool

    @property
    def seconds(self) -> float:
        return max(self.bundles, self.products, self.memory)


class Roofline:
    """The operations of a program. `kernel_steps`: how often a kernel's grid runs, and the loop inside its steps."""

    def __init__(self, program: HloProgram, bundles: dict[str, Counter], chip, kernel_steps: tuple[int, int]):
        self.program, self.bundles, self.chip, self.kernel_steps = program, bundles, chip, kernel_steps
        self.named = {name: {one.name: one for one in body} for name, body in program.computations.items()}
        # The compiler makes equal operations once. Those without a file of their own have an equal one with a file.
        self.twins = {_likeness(one): bundles[one.name] for one, _ in program if one.name in bundles}

    def operations(self) -> Iterator[Operation]:
        inside = {_fused(one) for one, _ in self.program}
        for name, times in self.program.times.items():
            for one in self.program.computations[name] if name not in inside else ():
                if not is_free(one):
                    yield self._measure(name, one, times)

    def seconds(self) -> dict[str, float | None]:
        """Seconds of a step in kernels, and in all other operations. None for kernels if the dump lacks some."""
        found = {"kernels": 0.0, "operations": 0.0}
        operations = list(self.operations())
        for one in operations:
            found["kernels" if one.is_kernel else "operations"] += one.times * one.seconds
        if any(one.is_kernel and not one.bundles for one in operations):
            found["kernels"] = None
        return found

    def _measure(self, computation: str, one: Instruction, times: int) -> Operation:
        chip, is_kernel = self.chip, 'custom_call_target="tpu_custom_call"' in one.line
        count = self.bundles.get(one.name) or self.twins.get(_likeness(one), Counter())
        of_one, of_two = self.kernel_steps if is_kernel else (_iterations(one), _iterations(one))
        # A bundle outside loops runs once. The cores of a chip share the iterations of the outermost loop.
        runs = {0: 1, 1: of_one / chip.cores}
        cycles = sum(n * runs.get(loops, of_two / chip.cores) for loops, n in count.items())
        if is_kernel:
            return Operation(one.name, times, cycles / chip.clock, 0.0, 0.0, True)
        products = self.flops(_fused(one)) / chip.peak / PRODUCT_SHARE if _fused(one) else 0.0
        memory = self.traffic(computation, one) / chip.bandwidth / MEMORY_SHARE
        return Operation(one.name, times, cycles / chip.clock, products, memory, False)

    def flops(self, computation: str) -> float:
        """FLOPs of the matrix products in a fused computation. The TPU compiler calls all of them convolutions."""
        total = 0.0
        for one in self.program.computations[computation]:
            if one.opcode in ("convolution", "dot"):
                factors = [self.named[computation].get(name) for name in operands(one)[:2]]
                if all(factors):  # a [M, K] and a [K, N] give a [M, N]: the root of all sizes is M N K
                    total += 2 * math.sqrt(math.prod(_numbers(each.shape) for each in (*factors, one)))
            elif _fused(one):
                total += self.flops(_fused(one))
        return total

    def traffic(self, computation: str, one: Instruction) -> int:
        """Bytes that an instruction reads from HBM and writes to it."""
        named, names = self.named[computation], operands(one)
        if one.opcode == "dynamic-update-slice":  # in place: it reads and writes the slice
            return 2 * _hbm_bytes(named[names[1]].shape) if names[1] in named else 0
        if one.opcode in ("dynamic-slice", "slice"):
            return 2 * _hbm_bytes(one.shape)
        read = 0
        for position, name in enumerate(names):
            if name in named and not named[name].shape.startswith("("):
                whole = _hbm_bytes(named[name].shape)
                read += self._read_inside(_fused(one), position, whole) if _fused(one) and whole else whole
        return read + (self._written_by(_fused(one), one) if _fused(one) else _hbm_bytes(one.shape))

    def _read_inside(self, fused: str, position: int, whole: int) -> int:
        """Bytes that a fused computation reads of its parameter: all, or only slices of it."""
        for one in self.program.computations[fused]:
            if one.opcode == "parameter" and f"parameter({position})" in one.line:
                return self._read_of(fused, one.name, whole)
        return whole

    def _read_of(self, computation: str, name: str, whole: int) -> int:
        total = 0
        for one in self.program.computations[computation]:
            names = operands(one)
            if name not in names:
                continue
            if one.opcode in ("dynamic-slice", "slice", "gather") and names[0] == name:
                total += _hbm_bytes(one.shape, anywhere=True)
            elif one.opcode in ("bitcast", "reshape"):
                total += self._read_of(computation, one.name, whole)
            elif _fused(one):
                places = [position for position, other in enumerate(names) if other == name]
                total += sum(self._read_inside(_fused(one), position, whole) for position in places)
            elif one.opcode != "dynamic-update-slice" or names[0] != name:  # an update reads nothing of its target
                total += whole
        return min(total, whole)

    def _written_by(self, fused: str, one: Instruction) -> int:
        """Bytes that a fusion writes: its results, but only the slices of those that it updates in place."""
        body, named = self.program.computations[fused], self.named[fused]
        roots = operands(body[-1]) if body[-1].opcode == "tuple" else [body[-1].name]
        total = 0
        for shape, name in zip(ARRAY.finditer(one.shape), roots, strict=False):
            root = named.get(name)
            while root and root.opcode == "bitcast":
                root = named.get(operands(root)[0])
            update = named.get(operands(root)[1]) if root and root.opcode == "dynamic-update-slice" else None
            total += _hbm_bytes(update.shape, anywhere=True) if update else _hbm_bytes(shape[0])
        return total


def is_free(one: Instruction) -> bool:
    """Whether an instruction costs nothing here: structure, collectives, the ends of asynchronous work."""
    collective = one.opcode.startswith(COLLECTIVES) or one.opcode.endswith("-done")
    other_call = one.opcode == "custom-call" and "tpu_custom_call" not in one.line
    return one.opcode in FREE or collective or other_call


def operands(one: Instruction) -> list[str]:
    """The names of an instruction's operands."""
    start = one.line.index(f" {one.opcode}(") + len(one.opcode) + 2
    depth, end = 1, start
    while depth and end < len(one.line):
        depth += {"(": 1, ")": -1}.get(one.line[end], 0)
        end += 1
    return re.findall(r"%([\w.\-]+)", one.line[start:end])


def _fused(one: Instruction) -> str | None:
    """The computation that a fusion calls."""
    found = re.search(r"calls=%?([\w.\-]+)", one.line) if one.opcode == "fusion" else None
    return found and found[1]


def _iterations(one: Instruction) -> int:
    """How often the loops of an operation run, by the compiler's note."""
    found = re.search(r'"iteration_bounds":\[([^\]]*)\]', one.line)
    return math.prod(int(n) for n in re.findall(r"\d+", found[1])) if found else 1


def _likeness(one: Instruction) -> tuple:
    cycles = re.search(r'"estimated_cycles":"(\d+)"', one.line)
    return one.opcode, one.shape.replace("S(1)", ""), cycles and cycles[1]


def _numbers(shape: str) -> int:
    return math.prod(int(side) for side in ARRAY.search(shape)[3].split(",") if side)


def _hbm_bytes(shape: str, anywhere: bool = False) -> int:
    """Bytes of a shape's arrays in HBM, with the padding of their tiles; with `anywhere`, also of those in VMEM."""
    total = 0
    for _, bits, sides, order, layout in (found.groups() for found in ARRAY.finditer(shape)):
        space = re.search(r"S\((\d+)\)", layout or "")
        if space and (space[1] != "1" or not anywhere):
            continue
        sides = [int(side) for side in sides.split(",") if side]
        tile = re.search(r"T\((\d+),(\d+)\)", layout or "")
        if tile and len(sides) > 1:
            for axis, multiple in zip(order.split(","), (int(tile[2]), int(tile[1])), strict=False):
                sides[int(axis)] = -(-sides[int(axis)] // multiple) * multiple
        total += math.prod(sides) * max(int(bits or 8) // 8, 1)
    return total
