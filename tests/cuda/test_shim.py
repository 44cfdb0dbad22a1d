"""The shim that stands in for a GPU: it lets right kernels pass, whatever the order, and catches every seeded fault."""

import pytest
import torch
from compare import assert_same_bits
from shimmed import run

from fastvq.backends import cuda

# The fault: what is said of it, in a plain build and in one with sanitizers. "wrong result" is the program's own word.
CAUGHT = {
    "reverse": ("wrong result", "wrong result"),
    "reverse_twice": ("wrong result", "wrong result"),
    "reverse_warp": ("wrong result", "wrong result"),
    "race_between_warps": ("wrong result", "wrong result"),
    "order_of_blocks": ("wrong result", "wrong result"),
    "not_cleared": ("wrong result", "wrong result"),
    "shuffle_outside": ("lane 31 is outside the mask 7fffffff", "lane 31 is outside the mask 7fffffff"),
    "shuffle_from_outside": ("which is read, is outside the mask", "which is read, is outside the mask"),
    "shuffle_after_exit": ("thread 7 has ended", "thread 7 has ended"),
    "divergent_barrier": ("divergent: thread 0 waits in __syncthreads", "divergent: thread 0 waits in __syncthreads"),
    "two_barriers": ("divergent: thread 0 waits in __syncthreads", "divergent: thread 0 waits in __syncthreads"),
    "uneven_loop": ("divergent: thread 64 waits in __syncthreads", "divergent: thread 64 waits in __syncthreads"),
    "copy_in_flight": ("wrong result", "use-after-poison"),
    "copy_left_behind": ("copies that nothing waits for", "copies that nothing waits for"),
    "copy_misaligned": ("not aligned to 16 bytes", "not aligned to 16 bytes"),
    "misaligned_vector": ("misaligned address", "misaligned address"),
    "dynamic_past_its_size": ("shared memory past its size", "AddressSanitizer: SEGV"),
    "static_past_its_size": (None, "out of bounds"),
    "past_the_end": (None, "heap-buffer-overflow"),
    "before_the_start": (None, "heap-buffer-overflow"),
}


@pytest.mark.parametrize("name", CAUGHT)
def test_a_seeded_fault_is_caught_and_the_kernel_without_it_passes(faults, name):
    for variant, words in zip(("plain", "sanitized"), CAUGHT[name], strict=True):
        for seed in range(5):
            right = run(faults[variant], name, 0, seed)
            assert right.returncode == 0, f"{variant}, seed {seed}: {right.stdout}{right.stderr}"
        if words is None:
            continue
        caught = []
        for seed in range(5):
            wrong = run(faults[variant], name, 1, seed)
            caught.append(wrong.returncode != 0 and words in wrong.stdout + wrong.stderr)
        assert any(caught), f"{variant}: {wrong.stdout}{wrong.stderr}"


HIDDEN = (
    *["same_value", "written_again", "written_again_in_a_warp", "barrier_of_a_warp", "exchange_for_barrier"],
    "atomic_read_at_once",
)
RACES = ("reverse", "reverse_twice", "reverse_warp", "race_between_warps", "copy_in_flight", *HIDDEN)


@pytest.mark.parametrize("name", sorted({*CAUGHT, *RACES}))
def test_a_race_is_seen_in_any_order(faults, name):
    """Also where the result is right whatever runs first; and no race is seen where there is none."""
    for seed in range(3):
        right = run(faults["watched"], name, 0, seed)
        assert right.returncode == 0, right.stdout + right.stderr
        if name in RACES:
            assert ": race: it " in run(faults["watched"], name, 1, seed).stderr
        if name in HIDDEN and name != "exchange_for_barrier":
            assert run(faults["plain"], name, 1, seed).returncode == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_narrow_number_is_widened_exactly(kernels, dtype):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).unsqueeze(1)
    _, sums = cuda.code_sums(every, torch.arange(1 << 16), 1 << 16, None, False)
    finite = every.isfinite()
    assert_same_bits(sums[finite] + 0.0, every.float()[finite] + 0.0)  # a sum begins with +0
    assert_same_bits(sums[~finite], every.float()[~finite])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_are_narrowed_to_nearest_even(kernels, dtype):
    """Every narrow number, the middles between neighbours, and what lies beside these."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    bits = every[every.isfinite()].view(torch.int32)
    half = 1 << (12 if dtype == torch.float16 else 15)
    values = torch.cat([bits + offset for offset in (-half - 1, -half, -half + 1, -1, 0, 1, half - 1, half, half + 1)])
    codes = torch.cat(
        [values.view(torch.float32), torch.tensor([65519.99, 65520.0, 3.4e38, torch.inf, torch.nan, 1e-45])]
    )
    x = torch.zeros(len(codes), 1, dtype=dtype)
    quantized, _ = cuda.gather(x, codes.unsqueeze(1), torch.arange(len(codes)), 1.0, None)
    assert_same_bits(quantized.squeeze(1), codes.to(dtype))
