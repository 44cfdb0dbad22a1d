"""Models at their published configurations, with random weights: the codes before and after, up to rounding."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_clients


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "title",
    [
        "EnCodec 24 kHz, 32 stages, 10 s",
        "Mimi, 32 stages, 10 s",
        "X-Codec, 8 stages, 10 s",
        "Wav2Vec2 base, 2 x 10 s",
        "VQ-f4, 256 pixels",
    ],
)
def test_codes(title):
    with torch.no_grad():
        agreement = bench_clients.patched(title).agreement()
    assert agreement.codes > 0
    assert agreement.unexplained == 0
