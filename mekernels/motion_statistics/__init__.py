"""Running means of the attention statistics that head and token selection need."""

from .statistics import MotionStatistics

__all__ = ["MotionStatistics"]
