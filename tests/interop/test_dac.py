"""descript-audio-codec: its residual quantiser."""

from __future__ import annotations

import pytest
import torch
from drop_in import check_drop_in
from unpacked import import_alone

from fastvq.interop.patching import differs, library


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_residual():
    quantize = import_alone("dac.nn.quantize")
    module = quantize.ResidualVectorQuantize(12, n_codebooks=4, codebook_size=37, codebook_dim=8, quantizer_dropout=0.5)
    for stage in module.quantizers:  # after a call its tensors cannot be copied
        torch.nn.utils.remove_weight_norm(stage.in_proj)
        torch.nn.utils.remove_weight_norm(stage.out_proj)
    x = torch.randn(4, 12, 23)
    for training in (False, True):
        report = check_drop_in(module.train(training), lambda m: m(x), pickles=False)
        assert [m.name for m in report.done] == [f"quantizers.{i}" for i in range(4)]
    check_drop_in(module.eval(), lambda m: m(x, n_quantizers=2), pickles=False)
    latents = torch.randn(2, 32, 9)
    check_drop_in(module, lambda m: m.from_latents(latents), pickles=False)


def test_every_class_of_the_installed_version_is_known():
    import_alone("dac.nn.quantize")
    assert [differs(c) for c in library("dac").CLIENTS.values()] == [None]
