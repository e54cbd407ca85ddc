"""Counts in the machine code (SASS) of an NVIDIA kernel."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);", re.MULTILINE)
_TARGET = re.compile(r"0x([0-9a-f]+)")
_USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)")


@dataclass(frozen=True, slots=True)
class Code:
    """Instructions by name: of a kernel, a loop of it or a path through it. NOP left out."""

    counts: Counter[str]

    def __len__(self) -> int:
        return sum(self.counts.values())

    def count(self, *prefixes: str) -> int:
        return sum(number for name, number in self.counts.items() if name.startswith(prefixes))

    def loaded_bytes(self) -> int:
        """Bytes that one thread loads from global memory when every instruction runs once."""
        return sum(number * _width(name) for name, number in self.counts.items() if name.startswith("LDG"))


def _width(name: str) -> int:
    parts = name.split(".")
    for part, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if part in parts:
            return size
    return 4


@dataclass(frozen=True, slots=True)
class _Line:
    address: int
    name: str
    conditional: bool
    target: int | None
    """Of a branch."""


def _listing(sass: str) -> list[_Line]:
    lines = []
    for address, predicate, name, rest in _LINE.findall(sass):
        target = _TARGET.search(rest) if name.split(".")[0] == "BRA" else None
        conditional = bool(predicate) or rest.startswith(("P", "!P", "UP", "!UP"))
        if name != "NOP":
            lines.append(_Line(int(address, 16), name, conditional, int(target[1], 16) if target else None))
    return lines


def _code(lines: list[_Line]) -> Code:
    return Code(Counter(line.name for line in lines))


def parse(sass: str) -> tuple[Code, list[Code]]:
    """Listing of one kernel -> the whole of it, and its innermost loops."""
    listing = _listing(sass)
    # The last instruction of every kernel is a jump to itself, no loop.
    spans = [(line.target, line.address) for line in listing if line.target is not None and line.target < line.address]
    inner = [span for span in spans if not any(_within(other, span) for other in spans if other != span)]
    loops = [[line for line in listing if low <= line.address <= high] for low, high in inner]
    return _code(listing), [_code(loop) for loop in loops]


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def shortest_and_longest_path(sass: str) -> tuple[Code, Code]:
    """From the entry of a kernel without loops to its end, by number of instructions."""
    listing = _listing(sass)
    paths: list[tuple[list[_Line], list[_Line]]] = [([], [])] * (len(listing) + 1)
    for index in range(len(listing) - 1, -1, -1):
        line = listing[index]
        leaves = line.name == "EXIT" or line.target is not None
        after = [] if leaves and not line.conditional else [paths[index + 1]]
        if line.target is not None and line.target > line.address:
            after.append(paths[next(i for i in range(index, len(listing)) if listing[i].address >= line.target)])
        shortest = min((short for short, _ in after), key=len, default=[])
        longest = max((long for _, long in after), key=len, default=[])
        paths[index] = ([line, *shortest], [line, *longest])
    return _code(paths[0][0]), _code(paths[0][1])


def parse_usage(text: str) -> tuple[int, int]:
    """`cuobjdump -res-usage` of one kernel -> registers, and bytes of stack (spills among them)."""
    found = _USAGE.search(text)
    if found is None:
        raise ValueError(f"no resource usage in: {text.strip()[:200]}")
    registers, stack, _, local = map(int, found.groups())
    return registers, stack + local
