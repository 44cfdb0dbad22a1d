"""What the processes of a data-parallel job must agree on, so that every one keeps the same codebook."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from fastvq.nn.straight_through import straight_through


def world_size() -> int:
    """The number of processes; 1 without a process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def all_reduce_(tensor: Tensor, *, shared: bool = True) -> Tensor:
    """`tensor`, replaced by its sum over the processes when `shared`."""
    if shared and world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def take_turns(drawn: Tensor, served: Tensor, *, shared: bool = True) -> tuple[Tensor, Tensor]:
    """The same draw on every process, when `shared`: code k takes what process k mod W has drawn for it.

    Args:
        drawn: (H, K, D), this process's row for each code.
        served: (H, K) bool, whether it has one.
        shared: whether the processes agree; else each keeps its own.

    Returns:
        drawn and served, agreed; a code whose process has no row for it is not served.
    """
    processes = world_size()
    if not shared or processes == 1:
        return drawn, served
    turn = torch.arange(served.shape[1], device=served.device) % processes
    served = served & (turn == distributed.get_rank())
    drawn = all_reduce_(drawn.masked_fill(~served.unsqueeze(-1), 0.0))
    return drawn, all_reduce_(served.to(drawn.dtype)) > 0


def mean_over_processes(tensor: Tensor) -> Tensor:
    """The mean over the processes, with the gradient of this process's own `tensor`.

    That is the gradient of a loss on the mean, once the gradients of the processes have been averaged, as
    DistributedDataParallel does.
    """
    processes = world_size()
    if processes == 1:
        return tensor
    return straight_through(tensor, all_reduce_(tensor.detach().clone()) / processes)
