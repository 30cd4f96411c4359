"""Disassemble the compiled kernels, without a GPU, and read their hot loops instruction by instruction.

python -m tests.host.machine_code attention attention_f16_64 90     the loops of a kernel on sm_90: what is in them

A comment `// hot: NAME` in a CUDA source names the statement on the next line, to the end of its braces. A kernel's
`region(NAME)` is the machine code of those lines, whatever the compiler inlined, unrolled or moved; `loop(NAME)` is
the loop that they are, or that they run in.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import metadata
from pathlib import Path

from rbe_gpu.gpu import _source

from . import nvrtc

PACKAGE = "nvidia-cuda-nvdisasm"
_LABEL = re.compile(r"(\.L_\w+):\s*")
_LINE = re.compile(r'\s*//## File "([^"]+)", line (\d+)( inlined at .*)?')
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;?\s*")
_REGISTER = re.compile(r"(?<![A-Z0-9_.])R(\d+)((?:\.\w+)*)")
_NO_RESULT = (
    "ST", "RED", "BRA", "BRX", "EXIT", "BAR", "MEMBAR", "WARPSYNC", "NOP", "BSYNC", "BSSY", "RET", "CALL", "LDGSTS",
    "LDGDEPBAR", "DEPBAR", "ERRBAR", "CCTL", "FENCE", "YIELD", "BREAK", "BMOV", "SYNCS", "UTMALDG", "UTMASTG",
    "WARPGROUP", "ARRIVES", "NANOSLEEP", "KILL", "BPT",
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes
    ----------
    address : bytes from the kernel's start
    guard : predicate that it is executed under, with its @ ("@!P0"), or ""
    opcode : with its modifiers ("HMMA.16816.F32")
    operands : as nvdisasm writes them
    target : address that a branch goes to
    lines : (file, line) of the source, then of the calls that it was inlined through, from the inside out
    """

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    target: int | None
    lines: tuple[tuple[str, int], ...]

    def is_a(self, pattern: str) -> bool:
        """Whether the regular expression matches the whole opcode, or all of it before a dot ("LDG", r"LDG\\.E")."""
        return re.fullmatch(rf"(?:{pattern})(?:\.\S*)?", self.opcode) is not None

    @property
    def bits(self) -> int:
        """Width of a load, store or copy: 128, 64, 32, 16 or 8."""
        if self.is_a("LDSM|STSM"):
            return 32 * self._matrices
        width = re.search(r"\.(128|64|U16|S16|U8|S8)(?:\.|$)", self.opcode)
        return int(width[1].lstrip("US")) if width else 32

    @property
    def _matrices(self) -> int:
        count = re.search(r"\.([124])$", self.opcode)
        return int(count[1]) if count else 1

    @property
    def _result(self) -> int:
        """Registers of the result."""
        if self.is_a("LDSM"):
            return self._matrices
        if self.is_a("LD|LDG|LDS|LDL|LDC|ATOM|ATOMG|ATOMS"):
            return max(1, self.bits // 32)
        if self.is_a("HMMA|IMMA"):
            return 4 if re.search(r"\.F32\b|^IMMA\.16", self.opcode) else 2
        return (
            2 if re.match(r"IMAD\.WIDE|D(ADD|MUL|FMA)|F2F\.F64|I2F\.F64|CS2R$|S2UR\.64", self.opcode) else 1
        )

    def _has_result(self) -> bool:
        if self.is_a("|".join(f"{name}[A-Z]*" if name == "ST" else name for name in _NO_RESULT)):
            return False
        return bool(self.operands) and re.match(r"R\d", self.operands[0]) is not None

    @cached_property
    def writes(self) -> frozenset[int]:
        """Numbers of the registers that it writes."""
        if not self._has_result():
            return frozenset()
        first = int(re.findall(r"\d+", self.operands[0])[0])
        return frozenset(range(first, first + self._result))

    @cached_property
    def reads(self) -> frozenset[int]:
        """Numbers of the registers that it reads."""
        operands = self.operands[1:] if self._has_result() else self.operands
        read: set[int] = set()
        for place, operand in enumerate(operands):
            for number, modifiers in _REGISTER.findall(operand):
                first = int(number)
                read.update(range(first, first + self._width(place, operand, modifiers)))
        return frozenset(read)

    def _width(self, place: int, operand: str, modifiers: str) -> int:
        """Registers of a source operand."""
        if "[" in operand:
            return 2 if ".64" in modifiers else 1
        if self.is_a("HMMA|IMMA"):
            first = 2 if re.search(r"\.1688|\.8816", self.opcode) else 4
            return (first, first // 2, self._result)[min(place, 2)]
        if self.is_a("ST[A-Z]*|RED"):
            return self._matrices if self.is_a("STSM") else max(1, self.bits // 32)
        if re.match(r"D(ADD|MUL|FMA|SETP)", self.opcode) or (
            self.opcode.startswith("IMAD.WIDE") and place == 2
        ):
            return 2
        return 1

    def __str__(self) -> str:
        return f"{self.address:5x}  {self.guard:5} {self.opcode} {', '.join(self.operands)}"


@dataclass(frozen=True)
class Code:
    """Instructions in the order of their addresses."""

    instructions: tuple[Instruction, ...]

    def __len__(self) -> int:
        return len(self.instructions)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions)

    def of(self, pattern: str) -> list[Instruction]:
        """Instructions whose opcode the regular expression matches (see `Instruction.is_a`)."""
        return [i for i in self.instructions if i.is_a(pattern)]

    def count(self, pattern: str) -> int:
        return len(self.of(pattern))

    @property
    def moves(self) -> int:
        """Instructions that only copy a register or a constant."""
        return self.count(r"MOV|IMAD\.MOV") + sum(
            i.operands[1:] == ("-RZ", "RZ", "0", "0") for i in self.of("HFMA2")
        )

    @property
    def local(self) -> int:
        """Accesses of local memory: spills, and arrays indexed at run time."""
        return self.count("LDL|STL")

    def mix(self) -> Counter[str]:
        """How often there is each opcode, without modifiers."""
        return Counter(i.opcode.split(".")[0] for i in self.instructions)


@dataclass(frozen=True)
class Loop(Code):
    """A loop: a block of instructions that all paths into it pass through, and all from where it is reached again.

    Attributes
    ----------
    header : address of that block
    depth : loops around it
    """

    header: int
    depth: int

    def first_use(self, instruction: Instruction) -> int | None:
        """How many instructions later, round the loop where need be, a result of `instruction` is first read.

        None where it is overwritten before. Branches in the loop are passed over.
        """
        at = self.instructions.index(instruction)
        results = set(instruction.writes)
        for distance in range(1, len(self) + 1):
            other = self.instructions[(at + distance) % len(self)]
            if other.reads & results:
                return distance
            if not other.guard:
                results -= other.writes
            if not results:
                return None
        return None

    def between(self, instruction: Instruction, distance: int, pattern: str) -> int:
        """How many of the `distance` instructions from `instruction` on, round the loop, match `pattern`."""
        at = self.instructions.index(instruction)
        return sum(self.instructions[(at + k) % len(self)].is_a(pattern) for k in range(1, distance))


@dataclass(frozen=True)
class Kernel(Code):
    """The machine code of a kernel, with what ptxas says of its registers and shared memory."""

    name: str
    architecture: nvrtc.Architecture
    usage: nvrtc.Usage
    texts: dict[str, str]  # of the source files, by name

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """All loops, in the order of their first instruction, outer ones first."""
        bodies = _loop_bodies(self.instructions)
        loops = [
            Loop(tuple(i for i in self if i.address in body), header, sum(body < b for b in bodies.values()))
            for header, body in bodies.items()
        ]
        return tuple(sorted(loops, key=lambda loop: (loop.instructions[0].address, -len(loop))))

    def region(self, name: str) -> Code:
        """The machine code of the statement that `// hot: name` stands before.

        Raises
        ------
        KeyError
            No such comment, or more than one; or nothing of the statement is in this kernel.
        """
        (file, first, last) = _marked(self.texts, name)
        code = Code(tuple(i for i in self if any(f == file and first <= line <= last for f, line in i.lines)))
        if not code:
            raise KeyError(f"{self.name} has no code of the statement marked `// hot: {name}` in {file}")
        return code

    def loop(self, name: str) -> Loop:
        """The loop that the marked statement is; if it is none, the innermost one that it runs in."""
        file, first, _ = _marked(self.texts, name)
        region = {i.address for i in self.region(name)}
        shared = {o: len(region.intersection(i.address for i in o)) for o in self.loops}
        if not any(shared.values()):
            raise KeyError(f"{self.name}: the statement marked `// hot: {name}` is in no loop")
        same = [o for o in shared if any((file, first) in i.lines for i in o if i.target == o.header)]
        return max(same or shared, key=lambda o: (shared[o], -len(o)))

    def innermost(self, pattern: str) -> Loop:
        """Of the loops that hold no other with such an instruction, the one with the most that match `pattern`.

        Raises
        ------
        KeyError
            No loop has one.
        """
        having = [o for o in self.loops if o.count(pattern)]
        inner = [
            o for o in having
            if not any(x is not o and set(x.instructions) <= set(o.instructions) for x in having)
        ]  # fmt: skip
        if not inner:
            raise KeyError(f"{self.name}: no loop has {pattern}")
        return max(inner, key=lambda o: o.count(pattern))

    def blocks_per_sm(self, threads: int, dynamic_shared: int = 0) -> int:
        """Blocks of `threads` threads that a multiprocessor holds at once."""
        return blocks_per_sm(
            self.usage.registers, threads, self.usage.shared + dynamic_shared, self.architecture
        )


#: By architecture: warps, blocks and KB of shared memory of a multiprocessor, and KB that a block reserves beside its
#: own (CUDA C++ Programming Guide, "Compute Capabilities"). 65536 registers in units of 256 a warp, in all of them.
_LIMITS = {
    75: (32, 16, 64, 0), 80: (64, 32, 164, 1), 86: (48, 16, 100, 1), 89: (48, 24, 100, 1), 90: (64, 32, 228, 1),
    100: (64, 32, 228, 1), 120: (48, 32, 100, 1),
}  # fmt: skip


def blocks_per_sm(registers: int, threads: int, shared: int, architecture: nvrtc.Architecture) -> int:
    """Blocks that a multiprocessor of sm_<architecture> holds at once."""
    most_warps, most_blocks, kilobytes, reserved = _LIMITS[int(str(architecture).rstrip("a"))]
    warps = -(-threads // 32)
    by_registers = (
        65536 // (-(-registers * 32 // 256) * 256) // 4 * 4 // warps
    )  # warps are spread over 4 schedulers
    by_shared = (kilobytes << 10) // max(1, -(-shared // 128) * 128 + (reserved << 10))
    return min(most_blocks, most_warps // warps, by_registers, by_shared)


def _successors(i: Instruction, following: int | None) -> list[int]:
    """Addresses that may be executed after an instruction."""
    if i.is_a("EXIT|RET|KILL") and not i.guard:
        return []
    after = [] if following is None else [following]
    if i.target is None or not i.is_a("BRA"):
        return after  # a call returns
    always = not i.guard and len(i.operands) == 1 and not i.is_a(r"BRA\.(DIV|CONV).*")
    return [i.target] if always else [*after, i.target]


def _order(start: int, successors: dict[int, list[int]]) -> list[int]:
    """Reachable addresses in reverse postorder."""
    order: list[int] = []
    seen = {start}
    stack = [(start, iter(successors[start]))]
    while stack:
        address, rest = stack[-1]
        for other in rest:
            if other not in seen:
                seen.add(other)
                stack.append((other, iter(successors[other])))
                break
        else:
            order.append(address)
            stack.pop()
    return order[::-1]


def _dominators(order: list[int], before: dict[int, list[int]]) -> dict[int, int]:
    """The immediate dominator of every address (Cooper, Harvey and Kennedy 2001)."""
    place = {address: k for k, address in enumerate(order)}
    dominator = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for address in order[1:]:
            known = [p for p in before[address] if p in dominator]
            nearest = known[0]
            for other in known[1:]:
                while nearest != other:
                    if place[nearest] > place[other]:
                        nearest = dominator[nearest]
                    else:
                        other = dominator[other]
            if dominator.get(address) != nearest:
                dominator[address] = nearest
                changed = True
    return dominator


def _loop_bodies(instructions: tuple[Instruction, ...]) -> dict[int, frozenset[int]]:
    """The natural loops, as addresses by their first; those with the same first instruction are one."""
    following = dict(
        zip((i.address for i in instructions), (i.address for i in instructions[1:]), strict=False)
    )
    successors = {i.address: _successors(i, following.get(i.address)) for i in instructions}
    order = _order(instructions[0].address, successors)
    before: dict[int, list[int]] = {address: [] for address in order}
    for address in order:
        for other in successors[address]:
            before[other].append(address)
    dominator = _dominators(order, before)

    def dominates(header: int, address: int) -> bool:
        while address != header and dominator[address] != address:
            address = dominator[address]
        return address == header

    bodies: dict[int, set[int]] = {}
    for address in order:
        for header in successors[address]:
            if header <= address and dominates(header, address):
                body = bodies.setdefault(header, {header})
                waiting = [address]
                while waiting:
                    inside = waiting.pop()
                    if inside not in body:
                        body.add(inside)
                        waiting += before[inside]
    return {header: frozenset(body) for header, body in bodies.items()}


def _marked(texts: dict[str, str], name: str) -> tuple[str, int, int]:
    """File, first and last line of the statement after `// hot: name`."""
    mark = re.compile(rf"^[ \t]*// hot: {re.escape(name)}$", re.MULTILINE)
    places = [(file, m.end()) for file, text in texts.items() for m in mark.finditer(text)]
    if len(places) != 1:
        raise KeyError(f"{len(places)} comments `// hot: {name}` in {', '.join(texts)}; there must be one")
    file, start = places[0]
    text = re.sub(r"//[^\n]*", lambda m: " " * len(m[0]), texts[file])
    depth, end = 0, start
    for end in range(start, len(text)):
        character = text[end]
        depth += (character in "({[") - (character in ")}]")
        if depth == 0 and character in "};":
            break
    return file, text.count("\n", 0, start) + 2, text.count("\n", 0, end) + 1


@lru_cache
def _disassembler() -> Path:
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise nvrtc.NvrtcError(f"{PACKAGE} is not installed; pip install '{PACKAGE}>=13'") from None
    for file in files:
        if file.name in ("nvdisasm", "nvdisasm.exe"):
            return Path(str(file.locate()))
    raise nvrtc.NvrtcError(f"{PACKAGE} {metadata.version(PACKAGE)} holds no nvdisasm")


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_disassembler()), "--print-code", "--print-line-info-inline", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise nvrtc.NvrtcError(f"nvdisasm: {done.stderr}")
    return done.stdout


def _split(operands: str) -> tuple[str, ...]:
    """At the commas."""
    return tuple(part.strip() for part in operands.split(",")) if operands else ()


def _parse(text: str) -> dict[str, tuple[Instruction, ...]]:
    """Instructions by section."""
    kernels: dict[str, tuple[Instruction, ...]] = {}
    for section in re.split(r"^//-+ \.text\.", text, flags=re.MULTILINE)[1:]:
        name, _, body = section.partition(" ")
        labels: dict[str, int] = {}
        waiting: list[str] = []
        chain: list[tuple[str, int]] = []
        complete = True
        rows: list[tuple[re.Match[str], tuple[tuple[str, int], ...]]] = []
        for row in body.splitlines():
            if line := _LINE.fullmatch(row):
                if complete:
                    chain = []
                chain.append((Path(line[1]).name, int(line[2])))
                complete = line[3] is None
            elif label := _LABEL.fullmatch(row):
                waiting.append(label[1])
            elif instruction := _INSTRUCTION.fullmatch(row):
                labels.update(dict.fromkeys(waiting, int(instruction[1], 16)))
                waiting = []
                rows.append((instruction, tuple(chain)))
        kernels[name] = tuple(_instruction(match, lines, labels) for match, lines in rows)
    return kernels


def _instruction(
    match: re.Match[str], lines: tuple[tuple[str, int], ...], labels: dict[str, int]
) -> Instruction:
    address, guard, opcode, operands = match.groups()
    label = re.search(r"`\((\.L_\w+)\)", operands)
    target = labels.get(label[1]) if label else None
    return Instruction(int(address, 16), guard or "", opcode, _split(operands), target, lines)


def kernels_of(text: str, architecture: nvrtc.Architecture) -> dict[str, Kernel]:
    """The kernels of an inlined source (`_source.expand`), by name.

    Raises
    ------
    NvrtcError
        The source does not compile, or a package is not installed.
    """
    usage = nvrtc.compile_source(text, architecture).kernels
    code = _parse(_disassemble(nvrtc.machine_code(text, architecture)))
    texts = _files(text)
    return {name: Kernel(code[name], name, architecture, usage[name], texts) for name in usage}


def _files(text: str) -> dict[str, str]:
    """The files of an inlined source, with every line where it stands in its file."""
    files: dict[str, dict[int, str]] = {}
    file, number = "", 1
    for line in text.splitlines():
        if place := re.fullmatch(r'#line (\d+) "([^"]+)"', line):
            number, file = int(place[1]), place[2]
            continue
        files.setdefault(file, {})[number] = line
        number += 1
    return {
        name: "\n".join(lines.get(i, "") for i in range(1, max(lines) + 1)) for name, lines in files.items()
    }


@lru_cache
def kernels(op: str, architecture: nvrtc.Architecture = 90, **constants: int) -> dict[str, Kernel]:
    """The kernels of `cuda_src/<op>.cu`. constants : "Struct.field" that they are compiled for"""
    return kernels_of(_source.expand(f"{op}.cu", _source.read(f"{op}.cu"), constants), architecture)


def main() -> None:
    op, name, *chosen = sys.argv[1:]
    kernel = kernels(op, int(chosen[0]) if chosen else 90)[name]
    print(f"{name}: {len(kernel)} instructions, {kernel.usage}")
    for loop in kernel.loops:
        first, last = loop.instructions[0], loop.instructions[-1]
        mix = ", ".join(f"{count} {opcode}" for opcode, count in loop.mix().most_common())
        place = " < ".join(f"{file}:{line}" for file, line in first.lines)
        print(f"{'  ' * loop.depth}{first.address:x} to {last.address:x} ({place}): {len(loop)}: {mix}")
        print(f"{'  ' * loop.depth}  moves {loop.moves}, local memory {loop.local}")


if __name__ == "__main__":
    main()
