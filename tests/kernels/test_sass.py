"""The reader of machine code finds the loop that matters and counts what is in it."""

from types import SimpleNamespace

import pytest

from benchmarks import sass

# A loop over codes; in it one over D with two products, a wait in a corner out of line, and a branch over a store.
NESTED = """
.text._kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_codes:
        /*0010*/                   FADD R1, R1, 1 ;
.L_dims:
        /*0020*/                   LDS.128 R4, [R2] ;
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0040*/                   HMMA.16816.F32.BF16 R12, R4, R6, R12 ;
        /*0050*/              @!P0 BRA `(.L_dims) ;
        /*0060*/                   FMNMX R1, R1, R8, PT ;
        /*0070*/                   FMNMX R1, R1, R9, PT ;
        /*0080*/              @P1  BRA `(.L_wait) ;
.L_back:
        /*0090*/                   SHFL.BFLY PT, R3, R1, 0x2, 0x1f ;
        /*00a0*/              @!P2 BRA `(.L_codes) ;
        /*00b0*/                   STL [R1], R3 ;
        /*00c0*/                   EXIT ;
.L_wait:
        /*00d0*/                   NANOSLEEP 0x20 ;
        /*00e0*/                   BRA `(.L_back) ;
.L_end:
        /*00f0*/                   BRA `(.L_end) ;
"""


def kernel(monkeypatch, text, warps=4, shared=1024, registers=64):
    """What `analyse` needs of a compiled kernel, and its listing."""
    monkeypatch.setattr(sass, "registers_of", lambda compiled: registers)
    return SimpleNamespace(asm={}, metadata=SimpleNamespace(num_warps=warps, shared=shared)), sass.parse_cuda(text)


def test_loops_are_found_by_their_jumps_back():
    listing = sass.parse_cuda(NESTED)
    inner, outer = listing.loops
    assert {listing.instructions[i].base for i in inner} == {"LDS", "HMMA", "BRA"}
    assert inner < outer
    assert "NANOSLEEP" in {listing.instructions[i].base for i in outer}
    assert "STL" not in {listing.instructions[i].base for i in outer}
    assert sass.spills_of(listing) == 1
    assert sass.tensor_instructions(listing) == {"HMMA"}


def test_jumps_to_addresses_are_jumps_to_labels():
    """nvdisasm gives no labels where it is given instructions alone, and one address for all kernels of a batch."""
    places = {}
    lines = []
    for line in NESTED.splitlines():
        if line.startswith("."):
            places[line.rstrip(":")] = len(lines) * 16
        elif line:
            lines.append(line)
    text = "\n".join(f"        /*{0x5000 + 16 * i:04x}*/" + line.split("*/")[1] for i, line in enumerate(lines))
    for label, place in places.items():
        text = text.replace(f"`({label})", hex(0x5000 + place))
    assert sass.parse_cuda(text).loops == sass.parse_cuda(NESTED).loops
    assert "`" not in text


def test_the_loop_over_d_counts_as_often_as_it_runs(monkeypatch):
    compiled = kernel(monkeypatch, NESTED)
    # Two m16n8k16 products in each of four warps: 1024 multiply-adds an instruction, of 64 dimensions.
    innermost = sass.analyse(*compiled, "sm_80", 64)
    assert innermost.elements == 2 * 2048 * 4 / 64
    assert innermost.alu == 0
    four_runs = sass.analyse(*compiled, "sm_80", 64, elements=4 * innermost.elements)
    assert four_runs.mix["HMMA"] == 8
    assert four_runs.mix["FMNMX"] == 2
    assert four_runs.shuffles == 1
    assert four_runs.alu == 2 * 32 * 4 / four_runs.elements
    assert four_runs.cycles["tensor"] == 8 * 8
    assert four_runs.cycles["memory"] == 4 * 16 + 4
    assert four_runs.bound == "memory"
    assert four_runs.tensor_fraction == 64 / 68
    half = sass.analyse(*compiled, "sm_80", 64, elements=innermost.elements / 2)
    assert half.mix["HMMA"] == 1


def test_what_the_code_cannot_tell_must_be_given(monkeypatch):
    compiled = kernel(monkeypatch, NESTED.replace("HMMA.16816.F32.BF16", "UTCHMMA"))
    with pytest.raises(ValueError, match="elements must be given"):
        sass.analyse(*compiled, "sm_100", 64)
    assert sass.analyse(*compiled, "sm_100", 64, elements=8192).cycles["tensor"] == 8192 * 64 / 4 / 1024


def test_occupancy_is_the_scarcest_of_registers_shared_memory_warps_and_blocks():
    assert sass.occupancy("sm_90", registers=255, shared=0, warps=8) == 1
    assert sass.occupancy("sm_90", registers=128, shared=0, warps=4) == 4
    assert sass.occupancy("sm_90", registers=32, shared=115_712, warps=4) == 2
    assert sass.occupancy("sm_90", registers=32, shared=115_713, warps=4) == 1
    assert sass.occupancy("sm_90", registers=16, shared=0, warps=1) == 32
    assert sass.occupancy("sm_120", registers=16, shared=0, warps=4) == 12
    assert sass.occupancy("gfx942", registers=256, shared=16_384, warps=4) == 2
