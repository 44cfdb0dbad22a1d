"""The whole training step of the layer: forward, EMA update, backward."""

from contenders import EVERY, measure

pytestmark = EVERY


def test_training_step(benchmark, contender, shape):
    measure(benchmark, "step", contender, shape)
