"""The whole training step of the layer: forward, EMA update, backward."""

from contenders import every, measure

from fastvq.cli.bench import STEP_SHAPES
from fastvq.measure.contenders import STEPS, step_work

pytestmark = every(STEPS, STEP_SHAPES)


def test_training_step(benchmark, contender, shape):
    measure(benchmark, f"step {shape}", step_work(contender, shape))
