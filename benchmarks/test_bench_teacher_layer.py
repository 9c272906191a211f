"""Motion statistics of one teacher layer: what reading adds to the attention it rides on."""

from measure.plan import planned
from measure.teacher_layer import diagonal_plans, layer_plans


@planned(layer_plans)
def test_teacher_layer(measure):
    measure()


@planned(diagonal_plans)
def test_diagonal_attention(measure):
    measure()
