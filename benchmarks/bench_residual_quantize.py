"""All stages of a residual quantiser, in evaluation."""

from contenders import every, measure

from fastvq.cli.bench import RESIDUAL_BATCH, RESIDUAL_SHAPE, RESIDUAL_STAGES
from fastvq.measure.contenders import RESIDUALS, residual_work

pytestmark = every(RESIDUALS, [RESIDUAL_SHAPE])


def test_residual_quantize(benchmark, contender, shape):
    work = residual_work(contender, RESIDUAL_BATCH, RESIDUAL_STAGES, shape)
    measure(benchmark, f"residual {RESIDUAL_STAGES} {shape}", work)
