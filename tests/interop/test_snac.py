"""snac: its residual quantiser, with strides."""

from __future__ import annotations

import torch
from drop_in import check_drop_in

from fastvq.interop.patching import differs, library


def test_residual():
    from snac.vq import ResidualVectorQuantize

    module = ResidualVectorQuantize(12, codebook_size=37, codebook_dim=8, vq_strides=[4, 2, 1])
    x = torch.randn(2, 12, 24)
    for training in (False, True):
        report = check_drop_in(module.train(training), lambda m: m(x), pickles=False)
        assert [m.name for m in report.done] == [f"quantizers.{i}" for i in range(3)]


def test_every_class_of_the_installed_version_is_known():
    assert [differs(c) for c in library("snac").CLIENTS.values()] == [None]
