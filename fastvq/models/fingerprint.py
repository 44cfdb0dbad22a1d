"""A name for the weights of a model, so that a token file knows the model it belongs to."""

from __future__ import annotations

import hashlib
import json

from torch import Tensor

from fastvq.models.vqvae import VQVAE

FINGERPRINT_BYTES = 16


def fingerprint(model: VQVAE) -> bytes:
    """16 bytes that change with the shape of the model, its weights or its codebook.

    The first half of a SHA-256 over everything that encoding and decoding depend on; the moving averages behind the
    codebook are no part of it.
    """
    digest = hashlib.sha256(json.dumps(_shape(model), sort_keys=True).encode())
    for name, tensor in sorted(_weights(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()[:FINGERPRINT_BYTES]


def _shape(model: VQVAE) -> dict[str, object]:
    # What only steers the training does not change what a code means.
    training = ("decay", "commitment_weight", "threshold_ema_dead_code", "kmeans_init", "data_variance")
    return {name: value for name, value in model.config.to_dict().items() if name not in training}


def _weights(model: VQVAE) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), "quantizer.codebook": model.quantizer.codebook}
