"""What the machine code of a compiled Triton kernel promises: its hot loop counted, instruction by instruction.

A static bound, not a time: the cycles that the busiest unit needs if nothing ever waits.
"""

from __future__ import annotations

import bisect
import itertools
import re
import struct
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from benchmarks.ahead_of_time import tool


class Machine(NamedTuple):
    """One multiprocessor (compute unit), and the cycles an instruction of a warp keeps a unit of a quarter of it."""

    macs: int  # float16 multiply-adds a cycle and quarter, float32 accumulation
    hmma: float  # cycles of mma.sync m16n8k16, which may stay below that rate; 0 where there is none
    alu: int  # integer, compare, select, minimum
    fma: int  # float32 multiply, add
    wide: int  # float64
    shared: int  # bytes, of which every block takes 1 KiB more than it asks for on CUDA
    warps: int
    blocks: int


# CUDA C++ Programming Guide, "Arithmetic Instructions" (results a clock and multiprocessor; a warp's 32 over a quarter
# of it are the cycles here) and "Technical Specifications per Compute Capability". Tensor rates follow from the dense
# float16 peaks, clocks and multiprocessors of the architecture whitepapers: A100 312 TFLOP/s, H100 SXM 989, B200 2250,
# RTX PRO 6000 Blackwell 504, MI300X 1307 (CDNA 3 whitepaper: 2048 FLOP a clock and unit). mma.sync on Hopper: 62 % of
# the wgmma rate (Luo et al., "Dissecting the NVIDIA Hopper Architecture through Microbenchmarking", 2024).
MACHINES = {
    "sm_80": Machine(256, 8.0, 2, 2, 4, 167_936, 64, 32),
    "sm_90": Machine(512, 6.4, 2, 1, 2, 233_472, 64, 32),
    "sm_100": Machine(1024, 6.4, 2, 1, 2, 233_472, 64, 32),
    "sm_120": Machine(128, 16.0, 2, 1, 64, 102_400, 48, 24),
    "gfx942": Machine(256, 0.0, 4, 4, 4, 65_536, 32, 32),
}

_UNITS = {
    "alu": "BMSK CS2R FCHK FMNMX FMNMX3 FSEL FSET FSETP HMNMX2 HSETP2 I2FP IABS IADD IADD3 IMNMX ISETP LEA LOP LOP3 MOV"
    " P2R PLOP3 PRMT R2P SEL SGXT SHF SHL SHR VABSDIFF VIADD VIADDMNMX VIMNMX VIMNMX3",
    "fma": "FADD FADD2 FFMA FFMA2 FMUL FMUL2 HADD2 HFMA2 HMUL2",
    "imad": "IMAD IDP",
    "wide": "DADD DFMA DMUL DSETP",
    "special": "BREV F2F F2I FLO FRND I2F MUFU POPC",
    "memory": "ATOM ATOMG ATOMS LDG LDGSTS LDL LDS LDSM LDTM MATCH RED SHFL STG STL STS STSM STTM",
}
_UNIT = {name: unit for unit, names in _UNITS.items() for name in names.split()}
TENSOR = re.compile(r"HMMA|HGMMA|IMMA|IGMMA|QMMA|QGMMA|UTC\w*MMA|v_mfma")


class Instruction(NamedTuple):
    """One line of machine code."""

    name: str  # with its modifiers
    text: str
    target: str | None  # label of a jump
    conditional: bool

    @property
    def base(self) -> str:
        return self.name.split(".")[0]


@dataclass
class Listing:
    """A kernel's machine code: instructions, and the index that each label stands before."""

    instructions: list[Instruction]
    labels: dict[str, int]

    @cached_property
    def _successors(self) -> list[list[int]]:
        """The instructions that may follow each."""
        result = []
        for i, instruction in enumerate(self.instructions):
            following = [] if i + 1 == len(self.instructions) else [i + 1]
            if instruction.target is not None and instruction.target in self.labels:
                jump = [self.labels[instruction.target]]
                result.append(jump + following if instruction.conditional else jump)
            elif instruction.base in ("EXIT", "RET", "s_endpgm") and not instruction.conditional:
                result.append([])
            else:
                result.append(following)
        return result

    @cached_property
    def loops(self) -> list[frozenset[int]]:
        """The natural loops, smallest first: all that reaches a jump back to a place that every way there passes."""
        starts = sorted({0, *self.labels.values()} - {len(self.instructions)})
        starts = sorted({*starts, *(i + 1 for i, s in enumerate(self._successors) if s != [i + 1])})
        starts = [i for i in starts if i < len(self.instructions)]
        ends = [*starts[1:], len(self.instructions)]
        number = {start: block for block, start in enumerate(starts)}
        successors = [[number[s] for s in self._successors[end - 1]] for end in ends]
        predecessors: list[list[int]] = [[] for _ in starts]
        for block, following in enumerate(successors):
            for s in following:
                predecessors[s].append(block)
        dominators = _dominators(successors, predecessors)
        bodies: dict[int, set[int]] = {}
        for block, following in enumerate(successors):
            for header in following:
                if block in dominators and header in dominators[block]:
                    body, waiting = bodies.setdefault(header, {header}), [block]
                    while waiting:
                        member = waiting.pop()
                        if member not in body:
                            body.add(member)
                            waiting += [p for p in predecessors[member] if p in dominators]
        found = [frozenset(i for b in body for i in range(starts[b], ends[b])) for body in bodies.values()]
        return sorted(found, key=len)


def _dominators(successors: list[list[int]], predecessors: list[list[int]]) -> dict[int, set[int]]:
    """For each block that can be reached from block 0, the blocks that every way to it passes."""
    reached, waiting = {0}, [0]
    while waiting:
        for s in successors[waiting.pop()]:
            if s not in reached:
                reached.add(s)
                waiting.append(s)
    dominators = {block: set(reached) for block in reached}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            common = set.intersection(*(dominators[p] for p in predecessors[block] if p in reached)) | {block}
            changed |= common != dominators[block]
            dominators[block] = common
    return dominators


_CUDA_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+\{?\s*(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_CUDA_TARGET = re.compile(r"`\((\.L[\w.$]*)\)|\b(0x[0-9a-f]+)\s*$")


def code_of(cubin: bytes) -> bytes:
    """The instructions of a cubin with one kernel: its section .text.NAME, by the headers of 64-bit ELF."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    start_of_names = sections[names][4]
    found = [
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin[start_of_names + name :].startswith(b".text.")
    ]
    if len(found) != 1:
        raise ValueError(f"the cubin must hold one kernel; it holds {len(found)}")
    return found[0]


def disassemble_all(cubins: list[bytes], arch: str) -> list[str]:
    """What nvdisasm makes of the instructions of each: it takes a third of a second to start, whatever it is given."""
    codes = [code_of(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        machine = arch.upper().replace("_", "") + ("a" if int(arch[3:]) >= 90 else "")
        command = [tool("nvdisasm"), "--binary", machine, file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ends = list(itertools.accumulate(map(len, codes)))
    pieces: list[list[str]] = [[] for _ in codes]
    for line in text.splitlines():
        found = _CUDA_LINE.search(line)
        if found:
            pieces[bisect.bisect_right(ends, int(found[1], 16))].append(line)
    return ["\n".join(piece) for piece in pieces]


def parse_cuda(text: str) -> Listing:
    """The listing of an NVIDIA kernel, from its disassembly, with labels or with addresses to jump to."""
    listing = Listing([], {})
    at: dict[str, int] = {}  # address: instruction
    for line in text.splitlines():
        label = re.match(r"(\.L[\w.$]*):", line)
        if label:
            listing.labels[label[1]] = len(listing.instructions)
        found = _CUDA_LINE.search(line)
        if found:
            address, guard, name, rest = found.groups()
            base = name.split(".")[0]
            target = _CUDA_TARGET.search(rest) if base in ("BRA", "BRX", "JMP", "CALL") else None
            conditional = bool(guard) or "P" in rest.split("`")[0]  # BRA.U UP0, `(.L_x_1)
            conditional = conditional or base == "CALL" or name == "BRA.DIV"  # CALL returns, as a rule
            at[hex(int(address, 16))] = len(listing.instructions)
            listing.instructions.append(Instruction(name, rest, target and (target[1] or target[2]), conditional))
    targets = {i.target for i in listing.instructions}
    listing.labels.update({address: place for address, place in at.items() if address in targets})
    return listing


def parse_amd(text: str) -> Listing:
    """The listing of an AMD kernel, from its assembly."""
    listing = Listing([], {})
    for line in text.splitlines():
        label = re.match(r"(\.LBB\w+):", line)
        if label:
            listing.labels[label[1]] = len(listing.instructions)
        found = re.match(r"\t([sv]_\w+|ds_\w+|global_\w+|buffer_\w+|flat_\w+|scratch_\w+)\s*([^;]*)", line)
        if found:
            jump = found[1].startswith(("s_cbranch", "s_branch"))
            target = found[2].strip() if jump else None
            listing.instructions.append(Instruction(found[1], found[2], target, found[1].startswith("s_cbranch")))
        if line.startswith("\ts_endpgm"):
            break
    return listing


def _macs(instruction: Instruction, warps: int) -> int | None:
    """Multiply-adds of a tensor instruction that all warps of a block execute; None where SASS does not tell."""
    shape = re.search(r"HGMMA\.64x(\d+)x(\d+)", instruction.name)
    if shape:
        return 64 * int(shape[1]) * int(shape[2]) * warps // 4
    shape = re.search(r"[HI]MMA\.(16)(8)(\d+)", instruction.name)
    if shape:
        return 16 * 8 * int(shape[3]) * warps
    shape = re.search(r"v_mfma_f32_(\d+)x(\d+)x(\d+)", instruction.name)
    return int(shape[1]) * int(shape[2]) * int(shape[3]) * warps if shape else None


def pipe(instruction: Instruction, arch: str) -> tuple[str, float]:
    """The unit that an instruction keeps busy, and for how many cycles a warp."""
    machine, base = MACHINES[arch], instruction.base
    if arch.startswith("gfx"):
        if base.startswith(("v_", "ds_")):
            return ("alu", machine.alu) if base.startswith("v_") else ("memory", 16)
        return "issue", 0
    unit = _UNIT.get(base, "issue")
    if unit == "memory":
        width = 4 if ".128" in instruction.name or base in ("LDSM", "STSM") else 2 if ".64" in instruction.name else 1
        return unit, 4 * (width if base in ("LDS", "STS", "LDSM", "STSM") else 1)
    cycles = {"alu": machine.alu, "fma": machine.fma, "imad": 2, "wide": machine.wide, "special": 8, "issue": 0}[unit]
    return ("fma" if unit == "imad" else unit), cycles


@dataclass(frozen=True)
class Report:
    """Counts for one iteration of the loop over codes, all warps of a block together where not said otherwise."""

    registers: int  # a thread
    spills: int  # loads and stores of local memory in the whole kernel
    shared: int  # bytes a block
    blocks: int  # a multiprocessor holds at once
    warps: int  # and so many warps with them
    elements: float  # (row, code) pairs
    mix: dict[str, float]  # instructions of a warp by name
    alu: float  # half-rate ALU operations an element
    shuffles: float  # SHFL instructions of a warp
    cycles: dict[str, float]  # by unit, of a quarter of a multiprocessor

    @property
    def bound(self) -> str:
        """The busiest unit."""
        return max(self.cycles, key=lambda unit: self.cycles[unit])

    @property
    def tensor_fraction(self) -> float:
        """The share of the time that the tensor cores are busy if nothing waits."""
        return self.cycles["tensor"] / max(self.cycles.values())


def listings_of(kernels: list[Any], arch: str) -> list[Listing]:
    """The machine code of Triton's CompiledKernels, all for one architecture."""
    if arch.startswith("gfx"):
        return [parse_amd(kernel.asm["amdgcn"]) for kernel in kernels]
    return [parse_cuda(text) for text in disassemble_all([kernel.asm["cubin"] for kernel in kernels], arch)]


def spills_of(listing: Listing) -> int:
    """Instructions that touch local memory (scratch on AMD)."""
    return sum(i.base in ("LDL", "STL") or i.name.startswith("scratch_") for i in listing.instructions)


def tensor_instructions(listing: Listing) -> set[str]:
    """The kinds of tensor instruction in a kernel, without their shapes."""
    found = (TENSOR.match(i.name) for i in listing.instructions)
    return {match[0] for match in found if match}


def registers_of(compiled: Any) -> int:
    """Registers a thread."""
    if "amdgcn" in compiled.asm:
        return int(re.search(r"\.vgpr_count:\s*(\d+)", compiled.asm["amdgcn"])[1])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool("cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", usage)[1])


def occupancy(arch: str, registers: int, shared: int, warps: int) -> int:
    """Blocks that a multiprocessor holds at once.

    CUDA: 65536 registers, given to warps in units of 256; shared memory, 1 KiB more a block; warps; blocks.
    AMD: 512 registers a lane of each of four SIMDs in units of 8, eight waves a SIMD; shared memory.
    """
    machine = MACHINES[arch]
    if arch.startswith("gfx"):
        waves = 4 * min(8, 512 // (-(-registers // 8) * 8))
        return min(waves // warps, machine.shared // max(shared, 1))
    by_registers = 65_536 // (-(-registers * 32 // 256) * 256 * warps)
    return min(by_registers, machine.shared // (shared + 1024), machine.warps // warps, machine.blocks)


def _hot_loop(listing: Listing, tensor: list[int]) -> frozenset[int]:
    """The innermost loop with the most tensor instructions; without any, the longest loop that holds no other."""
    holding = [(sum(i in loop for i in tensor), loop) for loop in listing.loops]
    if any(count for count, _ in holding):
        innermost = [(count, loop) for count, loop in holding if count and not any(c and o < loop for c, o in holding)]
        return max(innermost, key=lambda pair: pair[0])[1]
    leaves = [loop for loop in listing.loops if not any(other < loop for other in listing.loops)]
    return max(leaves, key=len, default=frozenset(range(len(listing.instructions))))


def analyse(compiled: Any, listing: Listing, arch: str, dim: int = 0, elements: float | None = None) -> Report:
    """Count the loop over codes of a compiled kernel; of one without a matrix product, its longest innermost loop.

    Args:
        compiled: Triton's CompiledKernel, of `ahead_of_time.compiled`.
        listing: its machine code.
        arch: a key of `MACHINES`.
        dim: dimensions multiplied for an element: D rounded up to what the kernel pads it to.
        elements: (row, code) pairs of one iteration of the loop over codes: rows times codes of a tile. Where the
            tensor instructions of the innermost loop do only a part of their multiply-adds, that loop runs over D and
            is counted as often as it runs, within the loop round it. By default what the innermost loop does; it must
            be given on sm_100, where SASS does not tell the shape of a tensor instruction.
    """
    machine, warps = MACHINES[arch], compiled.metadata.num_warps
    tensor = [i for i, instruction in enumerate(listing.instructions) if TENSOR.match(instruction.name)]
    loop = _hot_loop(listing, tensor)
    weight = dict.fromkeys(loop, 1.0)
    counted = [_macs(listing.instructions[i], warps) for i in tensor if i in loop]
    known = None if None in counted else float(sum(m for m in counted if m is not None))
    if not tensor:
        elements = 0.0
    elif elements is None:
        if not known:
            raise ValueError(f"elements must be given for {arch}: the loop does not tell how much it multiplies")
        elements = known / dim
    elif known and elements * dim > 1.01 * known:
        runs = elements * dim / known
        outer = next((bigger for bigger in listing.loops if loop < bigger), None)
        if outer is None:
            raise ValueError(f"the loop does {known / dim:.0f} elements, not {elements:.0f}, and none is round it")
        weight = {i: runs if i in loop else 1.0 for i in outer}
    elif known:
        weight = dict.fromkeys(loop, elements * dim / known)

    mix: Counter[str] = Counter()
    cycles = dict.fromkeys(("tensor", "alu", "fma", "memory", "special", "wide", "issue"), 0.0)
    quarter = warps / 4
    for i, times in weight.items():
        instruction = listing.instructions[i]
        mix[instruction.base] += times
        cycles["issue"] += times * quarter
        if "HMMA" in instruction.base and not instruction.base.startswith("UTC"):
            cycles["tensor"] += times * quarter * machine.hmma * (_macs(instruction, 1) or 0) / 2048
        elif not TENSOR.match(instruction.name):
            unit, busy = pipe(instruction, arch)
            cycles[unit] += times * quarter * busy
    if not cycles["tensor"] and tensor:
        cycles["tensor"] = elements * dim / 4 / machine.macs
    lanes = 64 if arch.startswith("gfx") else 32
    registers = registers_of(compiled)
    shared = compiled.metadata.shared
    blocks = occupancy(arch, registers, shared, warps)
    return Report(
        registers=registers,
        spills=spills_of(listing),
        shared=shared,
        blocks=blocks,
        warps=blocks * warps,
        elements=elements,
        mix=dict(mix.most_common()),
        alu=cycles["alu"] / machine.alu / quarter * warps * lanes / elements if elements else 0.0,
        shuffles=mix["SHFL"],
        cycles=cycles,
    )
