"""Students: model families, the capture of their attention, and the location of words among their tokens."""

from motionenhancer.students.capture import CapturedAttention, capture_attention
from motionenhancer.students.families import known_families, student_family
from motionenhancer.students.family import StudentFamily
from motionenhancer.students.layout import Encoded, TokenLayout, VisionLayout
from motionenhancer.students.load import load_student
from motionenhancer.students.words import WordMap, map_words

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
