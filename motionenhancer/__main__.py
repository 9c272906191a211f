"""`python -m motionenhancer COMMAND`: list the commands, or run one.

`motionenhancer COMMAND` and `python -m motionenhancer.COMMAND` do the same.
"""

from __future__ import annotations

import difflib
import importlib
import sys

COMMANDS = {
    "toy": "write a small world of moving shapes, with a trained teacher and student",
    "extract": "make the motion priors of a data file with a teacher and store them",
    "train": "fine-tune a student with its attention pulled toward the priors",
    "eval": "put a benchmark's questions to a student and score the answers",
    "agreement": "measure how far single-evaluation priors agree with the full procedure",
    "look": "write an html page that shows a run, a folder of priors, or one clip",
    "store": "list, verify or prune a folder of priors",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first argument names.

    Returns:
        The command's exit code; 2 for a command that does not exist.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: motionenhancer COMMAND [--option value ...]\n")
        for command, what in COMMANDS.items():
            print(f"  {command:<10} {what}")
        print("\nmotionenhancer COMMAND --help lists the options of a command.")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}"
        print(f"error: no command {name!r}; {hint}", file=sys.stderr)
        return 2
    module = importlib.import_module("motionenhancer." + ("toy.__main__" if name == "toy" else name))
    return module.main(rest)


if __name__ == "__main__":
    sys.exit(main())
