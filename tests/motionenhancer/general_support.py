"""Rows of Video-MME, MVBench, TempCompass and SEED-Bench as published, and how tests read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from motionenhancer.data import SkipLog
from motionenhancer.evaluation.benchmarks import BENCHMARKS, Rules, load_questions, render_prompt

CHOICES = ["A. Black.", "B. Gray.", "C. Green.", "D. Brown."]
VIDEOMME = [
    {
        "video_id": "001",
        "duration": "short",
        "videoID": "fFjv93ACGo8",
        "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
        "question_id": "001-1",
        "task_type": "Counting Problem",
        "question": "What colour is it?",
        "options": CHOICES,
        "answer": "C",
    },
    {
        "video_id": "601",
        "duration": "long",
        "url": "https://www.youtube.com/watch?v=Zz-_1",
        "question_id": "601-2",
        "question": "Which?",
        "options": CHOICES,
        "answer": "A",
    },
]
TEMPLATE = [
    {
        "video_id": "002",
        "duration_category": "medium",
        "questions": [
            {
                "question_id": f"002-{i}",
                "question": "Which?",
                "choices": CHOICES,
                "answer": "D",
                "response": "",
            }
            for i in (1, 2)
        ],
    }
]
MULTI_CHOICE = {
    "1034": {
        "action": [
            {"question": "What is he doing?\nA. dunking\nB. dribbling", "answer": "A. dunking"},
            {"question": "Which activity?\nA. passing\nB. dunking", "answer": "B. dunking"},
        ],
        "direction": [{"question": "Where to?\nA. left\nB. right", "answer": "B. right"}],
    },
    "1034_reverse": {"speed": [{"question": "How fast?\nA. slow\nB. fast", "answer": "A. slow"}]},
}
YES_NO = {"1034": {"order": [{"question": "Does he sit first?", "answer": "yes"}]}}
CAPTIONS = {
    "1034": {
        "attribute_change": [
            {
                "question": "Which caption fits?\nCaption A: It grows.\nCaption B: It shrinks.",
                "answer": "Caption B: It shrinks.",
            },
            {
                "question": "Which fits?\nOption 1: It grows.\nOption 2: It shrinks.",
                "answer": "Option 1: It grows.",
            },
        ]
    }
}
SEED = {f"choice_{letter}": f"choice {letter}" for letter in "abcd"}
SEEDBENCH = {
    "questions": [
        {
            **SEED,
            "answer": "A",
            "data_id": "145_259",
            "data_type": "image",
            "question": "How many?",
            "question_id": "101669",
            "question_type_id": 5,
        },
        {
            **SEED,
            "answer": "B",
            "data_id": "94328.webm",
            "data_type": "video",
            "question": "What action?",
            "question_id": "v1738",
            "question_type_id": 10,
        },
        {
            **SEED,
            "answer": "B",
            "data_id": "P03/P03_24.MP4",
            "data_type": "video",
            "question": "What next?",
            "question_id": "v1962",
            "question_type_id": 11,
            "segment": [648.0, 658.0],
        },
        {
            **SEED,
            "answer": "C",
            "data_id": "P06/cam01/P06_cereals.avi",
            "data_type": "video",
            "question": "What sequence?",
            "question_id": "v4397",
            "question_type_id": 12,
            "segment": [18, 166],
        },
    ],
    "question_type": {"Action Recognition": 10},
}


def load(name: str, folder: Path, value: Any, file: str = "file.json", **options: Any) -> tuple[Any, SkipLog]:
    path, log = folder / file, SkipLog()
    path.parent.mkdir(exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=1))
    return load_questions(BENCHMARKS[name], path, log, **options), log


def asked(name: str, question: Any) -> str:
    return render_prompt(BENCHMARKS[name].prompt, question)


def verdicts(name: str, question: Any, outputs: list[str], rules: Rules | None = None) -> list[bool]:
    return [BENCHMARKS[name].right(question, output, rules or Rules()) for output in outputs]


def mvbench(folder: Path) -> Path:
    (folder / "json").mkdir(parents=True)
    rows = {
        "action_antonym": [
            {
                "video": "1.webm",
                "question": "What is it?",
                "candidates": ["up", "down", "not sure"],
                "answer": "down",
            }
        ],
        "action_sequence": [
            {
                "video": "ZS9XR.mp4",
                "question": "What then?",
                "candidates": ["Ate.", "Sat.", "Ran.", "Lay."],
                "answer": "Ran.",
                "start": 11.1,
                "end": 19.6,
            },
            {"video": "x.mp4", "question": "What?", "candidates": ["a"], "answer": "b"},
            {"video": "y.mp4", "question": "What?", "candidates": ["a"], "answer": "a", "start": 3, "end": 2},
        ],
        "object_shuffle": [
            {"video": "v_1.mp4", "question": "Where?", "candidates": ["a", "b"], "answer": "a"}
        ],
        "moving_count": [
            {"video": "v_1.mp4", "question": "How many?", "candidates": ["1", "2"], "answer": "2"}
        ],
    }
    for name, value in rows.items():
        (folder / "json" / f"{name}.json").write_text(json.dumps(value))
    return folder / "json"
