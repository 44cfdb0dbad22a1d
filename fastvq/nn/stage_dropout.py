"""Quantiser dropout (SoundStream: Zeghidour et al., 2021, arXiv:2107.03312, section 3.4): fewer stages at random."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from fastvq.nn import checks
from fastvq.nn.distributed import all_reduce_

_SEEDS = 10_000


def shared_draw(high: int, device: torch.device) -> Tensor:
    """A random integer (), from 0 to high - 1, the same in every process of a data-parallel job."""
    return all_reduce_(torch.randint(high, (), device=device)) % high


def host_seed(device: torch.device, *, wait: bool = False) -> int | None:
    """A seed that all processes share, where the host need not `wait` for it: on the CPU, outside of a graph."""
    waiting = device.type != "cpu" or torch.compiler.is_compiling()
    return None if waiting and not wait else int(shared_draw(_SEEDS, device))


class StageDropout:
    """Draws the last stage that runs in a step, from a first one on, uniformly.

    Args:
        num_quantizers: Q.
        cutoff_index: the stages up to this one always run.
        multiple_of: the number of stages that run is rounded up to a multiple of this.
    """

    def __init__(self, num_quantizers: int, cutoff_index: int, multiple_of: int) -> None:
        checks.whole("quantize_dropout_cutoff_index", cutoff_index, 0)
        checks.whole("quantize_dropout_multiple_of", multiple_of, 1)
        if cutoff_index >= num_quantizers:
            raise ValueError(
                f"quantize_dropout_cutoff_index must be below num_quantizers = {num_quantizers}; got {cutoff_index}"
            )
        self.num_quantizers = num_quantizers
        self.cutoff_index = cutoff_index
        self.multiple_of = multiple_of

    def last(self, device: torch.device, seed: int | None = None) -> int | Tensor:
        """The last stage that runs, the same in every process.

        An int where the host knows it, with a seed or on the CPU, so that later stages need not run; else a tensor ()
        on the device, for which nobody waits.
        """
        seed = host_seed(device) if seed is None else seed
        if seed is None:
            return self._whole(self.cutoff_index + shared_draw(self.num_quantizers - self.cutoff_index, device))
        return self._whole(random.Random(seed).randrange(self.cutoff_index, self.num_quantizers))

    def _whole(self, last: Any) -> Any:
        return -(-(last + 1) // self.multiple_of) * self.multiple_of - 1
