"""Running means of what head and token selection read of a model's attention maps."""

from .statistics import MotionStatistics

__all__ = ["MotionStatistics"]
