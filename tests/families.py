"""Rows and codes of every kind that has ever broken a nearest-code search, deterministic by seed."""

import numpy as np
import torch

# name: dtype of the rows, dtype of the codes
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float64": (torch.float64, torch.float64),
    "mixed": (torch.bfloat16, torch.float32),
}

# What "huge" and "tiny" (subnormal, itself or squared) mean where 1e30 and 1e-40 do not exist or are nothing special.
HUGE = {torch.float32: 1e30, torch.bfloat16: 1e30, torch.float16: 1e4, torch.float64: 1e150}
TINY = {torch.float32: 1e-40, torch.bfloat16: 1e-40, torch.float16: 1e-7, torch.float64: 1e-160}


class _Draw:
    """One seeded source of random numbers; float64, to be rounded to the dtypes at the end."""

    def __init__(self, seed, x_dtype, code_dtype):
        self.generator = np.random.default_rng(seed)  # three times as fast as torch's
        self.dtypes = x_dtype, code_dtype

    def normal(self, *shape):
        return torch.from_numpy(self.generator.standard_normal(shape))

    def uniform(self, *shape):
        return torch.from_numpy(self.generator.random(shape))

    def below(self, high, *shape):
        return torch.from_numpy(self.generator.integers(high, size=shape))


def gaussian(draw, n, k, d):
    return draw.normal(n, d), draw.normal(k, d)


def clustered(draw, n, k, d):
    centres = 3 * draw.normal(max(1, k // 4), d)
    pick = draw.below(len(centres), n), draw.below(len(centres), k)
    return tuple(centres[p] + 0.02 * draw.normal(len(p), d) for p in pick)


def offset(draw, n, k, d):
    return draw.normal(n, d) + 10, draw.normal(k, d) + 10


def power_law(draw, n, k, d):
    spectrum = torch.arange(1, d + 1, dtype=torch.float64) ** -1.0
    return draw.normal(n, d) * spectrum, draw.normal(k, d) * spectrum


def duplicated(draw, n, k, d):
    codes = draw.normal(max(1, k // 2), d)
    return draw.normal(n, d), codes[draw.below(len(codes), k)]


def near_tied(draw, n, k, d):
    """Codes that are copies but for 1e-7, and rows half way between two codes."""
    codes = draw.normal(max(1, k // 3), d)
    codes = codes[draw.below(len(codes), k)] * (1 + 1e-7 * draw.normal(k, d))
    middle = (codes[draw.below(k, n)] + codes[draw.below(k, n)]) / 2
    return middle + draw.below(2, n, 1) * 1e-7 * draw.normal(n, d), codes


def all_equal(draw, n, k, d):
    return draw.normal(n, d), draw.normal(1, d).repeat(k, 1)


def huge(draw, n, k, d):
    return draw.normal(n, d) * HUGE[draw.dtypes[0]], draw.normal(k, d) * HUGE[draw.dtypes[1]]


def tiny(draw, n, k, d):
    return draw.normal(n, d) * TINY[draw.dtypes[0]], draw.normal(k, d) * TINY[draw.dtypes[1]]


def largest(draw, n, k, d):
    """Up to the largest finite number: squares, and in float64 distances, overflow."""
    values = []
    for rows, dtype in zip((n, k), draw.dtypes, strict=True):
        values.append((draw.uniform(rows, d) * 2 - 1) * torch.finfo(dtype).max)
    return tuple(values)


def integers(draw, n, k, d):
    """Many exact ties."""
    return draw.below(5, n, d) - 2.0, draw.below(5, k, d) - 2.0


def outlier_dimension(draw, n, k, d):
    scale = torch.ones(d, dtype=torch.float64)
    scale[d // 2] = 50
    return draw.normal(n, d) * scale, draw.normal(k, d) * scale


def fresh(draw, n, k, d):
    """A freshly initialised codebook: ||x||^2 swamps every difference."""
    return draw.normal(n, d), (draw.uniform(k, d) * 2 - 1) / k


def normalised(draw, n, k, d):
    return tuple(torch.nn.functional.normalize(draw.normal(rows, d), dim=-1) for rows in (n, k))


def scaled_rows(draw, n, k, d):
    """Rows and codes of every magnitude side by side."""
    return tuple(draw.normal(rows, d) * 10 ** (8 * draw.uniform(rows, 1) - 6) for rows in (n, k))


def zeros(draw, n, k, d):
    """Zeros of both signs: every distance ties."""
    return tuple((draw.below(2, rows, d) - 0.5) * 0.0 for rows in (n, k))


def not_finite(draw, n, k, d):
    """NaN and both infinities in some rows and some codes."""
    specials = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=torch.float64)
    values = []
    for rows in (n, k):
        value = draw.normal(rows, d)
        hit = draw.uniform(rows, d) < 0.5 / d
        value[hit] = specials[draw.below(3, int(hit.sum()))]
        values.append(value)
    return tuple(values)


FAMILIES = {
    family.__name__: family
    for family in (
        *(gaussian, clustered, offset, power_law, duplicated, near_tied, all_equal, huge, tiny, largest, integers),
        *(outlier_dimension, fresh, normalised, scaled_rows, zeros, not_finite),
    )
}


def make(family, n, k, d, dtype="float32", seed=0, heads=None):
    """x (n, d) and codebook (k, d), or (heads, n, d) and (heads, k, d), of a family and of a key of DTYPES."""
    if heads is not None:
        pairs = [make(family, n, k, d, dtype, 1000 * seed + 7 + head) for head in range(heads)]
        return tuple(torch.stack(tensors) for tensors in zip(*pairs, strict=True))
    x_dtype, code_dtype = DTYPES[dtype]
    x, codebook = FAMILIES[family](_Draw(seed, x_dtype, code_dtype), n, k, d)
    return x.to(x_dtype), codebook.to(code_dtype)
