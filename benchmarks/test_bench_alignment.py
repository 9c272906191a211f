"""The alignment loss on rows of two grids."""

from measure.alignment import plans
from measure.plan import planned


@planned(plans)
def test_alignment(measure):
    measure()
