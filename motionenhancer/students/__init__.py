"""Students: model families, the capture of their attention, and the location of words among their tokens."""

from .capture import CapturedAttention, capture_attention
from .families import known_families, student_family
from .family import StudentFamily
from .layout import Encoded, TokenLayout, VisionLayout
from .load import load_student
from .words import WordMap, map_words

__all__ = [
    "CapturedAttention",
    "Encoded",
    "StudentFamily",
    "TokenLayout",
    "VisionLayout",
    "WordMap",
    "capture_attention",
    "known_families",
    "load_student",
    "map_words",
    "student_family",
]
