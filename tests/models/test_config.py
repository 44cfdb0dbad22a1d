"""Configurations refuse what cannot be, and survive JSON."""

import json

import pytest

from fastvq.models import CONFIGS, VQVAEConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("in_channels", 2),
        ("hidden", ()),
        ("hidden", (32, 0)),
        ("kernel", 5),
        ("residual_blocks", -1),
        ("residual_channels", 0),
        ("code_dim", 0),
        ("codebook_size", 0),
        ("decay", 1.5),
        ("decay", float("nan")),
        ("commitment_weight", -0.1),
        ("threshold_ema_dead_code", -1),
        ("data_variance", 0.0),
    ],
)
def test_field_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        VQVAEConfig(**{name: value})


@pytest.mark.parametrize("name", CONFIGS)
def test_named_configurations_survive_json(name):
    assert VQVAEConfig.from_dict(json.loads(json.dumps(CONFIGS[name].to_dict()))) == CONFIGS[name]


@pytest.mark.parametrize("change", [{"extra": 1}, {"decay": None}])
def test_unknown_or_missing_fields_are_refused(change):
    values = VQVAEConfig().to_dict() | change
    if change == {"decay": None}:
        del values["decay"]
    with pytest.raises(ValueError, match="fields"):
        VQVAEConfig.from_dict(values)
