"""patch and unpatch: what they walk, what they refuse, what they report."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAEVectorQuantizer as Quantizer

import fastvq
from fastvq.interop import fingerprint, patching


class Setting:
    num_embeddings, embed_dim = 5, 3


def test_nested_and_shared_modules():
    shared = Quantizer(Setting)
    model = nn.ModuleDict(
        {"a": nn.Sequential(nn.Identity(), shared), "b": shared, "c": nn.ModuleList([Quantizer(Setting)])}
    )
    report = fastvq.patch(model)
    assert [m.name for m in report.done] == ["a.1", "c.0"]
    assert model["b"] is model["a"][1] is shared
    assert isinstance(shared, patching.FastModule)
    assert isinstance(shared, Quantizer)
    assert [m.name for m in fastvq.unpatch(model).done] == ["a.1", "c.0"]
    assert type(shared) is Quantizer
    assert fastvq.unpatch(model).modules == ()


def test_the_model_may_be_a_quantiser():
    module = Quantizer(Setting)
    report = fastvq.patch(module)
    assert [m.name for m in report.done] == [""]
    assert "(the model)" in str(report)
    assert "replaced" in str(report)
    assert "[fastvq]" in repr(module)
    assert type(module).__name__ == "ChameleonVQVAEVectorQuantizer"


def test_hooks_parameters_and_optimizer_stay():
    module = Quantizer(Setting)
    seen = []
    module.register_forward_hook(lambda *_: seen.append("forward"))
    module.embedding.register_forward_hook(lambda *_: seen.append("codes"))
    parameter = module.embedding.weight
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    fastvq.patch(module)
    assert module.embedding.weight is parameter
    module(torch.randn(1, 3, 2, 2, requires_grad=True))[1].backward()
    before = parameter.detach().clone()
    optimizer.step()
    assert not module.embedding.weight.equal(before)
    assert seen == ["codes", "forward"]


def test_a_subclass_is_left_alone():
    class Mine(Quantizer):
        pass

    report = fastvq.patch(nn.Sequential(Mine(Setting)))
    assert [(m.name, m.done) for m in report.modules] == [("0", False)]
    assert "subclass of ChameleonVQVAEVectorQuantizer" in report.left_alone[0].why
    assert "left alone: a subclass" in str(report)


def test_another_version_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(patching, "digest", lambda *classes: "0" * 16)
    module = Quantizer(Setting)
    report = fastvq.patch(module)
    assert type(module) is Quantizer
    assert report.done == ()
    assert "transformers" in report.left_alone[0].why
    assert "another ChameleonVQVAEVectorQuantizer than fastvq knows" in report.left_alone[0].why


def test_unknown_quantisers_are_named():
    class HomeMadeQuantizer(nn.Module):
        pass

    class QuantizedLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Quantizer(Setting)

    model = nn.ModuleDict(
        {"mine": HomeMadeQuantizer(), "outer": QuantizedLinear(), "ours": fastvq.VectorQuantize(4, 8)}
    )
    report = fastvq.patch(model)
    assert [(m.name, m.why) for m in report.left_alone] == [("mine", "not known to fastvq")]
    assert [m.name for m in report.done] == ["outer.inner"]


@pytest.mark.parametrize("function", [fastvq.patch, fastvq.unpatch])
def test_no_module(function):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got dict"):
        function({})


def test_a_pickle_of_another_version_opens_unpatched(monkeypatch):
    import pickle

    module = Quantizer(Setting)
    fastvq.patch(module)
    data = pickle.dumps(module)
    monkeypatch.setattr(patching, "digest", lambda *classes: "0" * 16)
    assert type(pickle.loads(data)) is Quantizer


def test_the_digest_is_of_the_code():
    class A:
        """A."""

        def f(self, x):
            """Doc."""
            return x + 1

    class B:
        def f(self, x):
            # a comment
            return x + 1

    same = fingerprint._code(A).replace("classA", "")
    assert same == fingerprint._code(B).replace("classB", "").replace("(x+1)", "x+1")
    assert fingerprint.digest(A) != fingerprint.digest(B)
    assert fingerprint.digest(type("Made", (), {})) is None
