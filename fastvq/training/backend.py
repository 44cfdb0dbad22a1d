"""Whether the quantiser will run, asked before anything is written."""

from __future__ import annotations

import torch

from fastvq.backends import select
from fastvq.data.errors import UserError


def check_backend(device: torch.device) -> None:
    """Make sure that a backend serves the device.

    Raises:
        UserError: FASTVQ_BACKEND names no backend.
        BackendUnavailableError: the backend it names cannot serve here.
    """
    try:
        select.backend_for(None, device)
    except ValueError as error:
        raise UserError(str(error)) from error
