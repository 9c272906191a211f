"""Rules for right answers: the published rule of each benchmark, and a second rule."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

#: Words that are not nouns and cannot come between an article and its noun: "A" before them is an option.
_NO_NOUN = (
    r"is isn was wasn are were has have had does do did can(?=\sbe) could will would shall should may might "
    r"must and or nor but so yet for because since as if when while(?!\s(?:later|ago|after)) although though "
    r"than then that which who whom whose where why how what of in on at to from by with without about into "
    r"over under after before instead only also too not rather(?=\sthan) therefore thus hence here there "
    r"please i you he she it we they me him her us them his its my your our their the a an this these those "
    r"both either neither seems appears looks fits matches describes shows depicts represents explains "
    r"captures reflects states says suggests indicates corresponds applies happens occurs follows aligns "
    r"agrees contains includes mentions"
)
#: "A" that may be an article: a lower-case word or a number follows on the line, and is none of these.
_ARTICLE = (
    r"A(?=[ \t]+(?:[a-z]|\d+-?[A-Za-z]))"
    rf"(?![ \t]+(?:(?:[a-z]{{1,20}}ly|best)[ \t]+)?(?:{'|'.join(_NO_NOUN.split())})(?!-?[a-z]))"
)
#: A letter that stands alone: named an option, capital, or lower-case in brackets; an article has no group.
_NAMED = re.compile(
    r"(?<![A-Za-z0-9'’])(?:"
    r"(?i:option[ \t]{1,8}(?P<option>[A-F])|(?:choice|letter)[ \t]{1,8}(?P<choice>(?-i:[A-F])))"
    rf"|{_ARTICLE}|(?P<capital>[A-F])|(?<=\()(?P<bracketed>[a-f])(?=\))"
    r")(?![A-Za-z0-9'’])"
)
_LETTERS = "ABCDEF"


def first_letter(output: str) -> str:
    """Read an option letter as MotionBench's authors do (``polish_answer`` of their repository).

    The rule takes the text before the first closing bracket, then the part after its first opening bracket,
    and then the first character. So ``"(B)"``, ``"B. left"`` and ``"I choose (B)"`` are B. The rule is blunt:
    case is kept, ``"Because"`` is B, ``"A or C"`` is A, and ``"The answer is B"`` is T.

    >>> [first_letter(s) for s in ("B", " (B) left", "B) left", "b", "Because", "It is B", "")]
    ['B', 'B', 'B', 'b', 'B', 'I', '']
    """
    text = output.partition(")")[0].strip()
    if "(" in text:
        text = text.split("(")[1].strip()
    return text[:1]


def lone_letter(output: str) -> str:
    """Read the single option letter A to F that stands alone; empty if there is none or more than one.

    A lone lower-case letter counts only as the whole answer or in brackets: "a" is also a word. A capital "A"
    counts as the article, not as a letter, if a noun can follow it: before a lower-case word that is not a
    verb, conjunction, preposition, pronoun or the like. After "option", "choice" or "letter" it always counts
    as a letter. After "option" a lower-case letter counts too. The time is linear in the length of the
    output.

    >>> [lone_letter(s) for s in ("(b)", "b.", "The answer is B.", "B) a dog")]
    ['B', 'B', 'B', 'B']
    >>> [lone_letter(s) for s in ("Because", "A or C", "A man walks")]
    ['', '', '']
    >>> [lone_letter(s) for s in ("Option A is correct.", "It is A because he turns.", "Not A, but B.")]
    ['A', 'A', '']
    """
    whole = output.strip(string.punctuation + string.whitespace)
    if len(whole) == 1 and whole.upper() in _LETTERS:
        return whole.upper()
    found: set[str] = set()
    for match in _NAMED.finditer(output):
        if match.lastgroup is not None:
            found.add(match[match.lastgroup].upper())
        if len(found) > 1:
            return ""
    return found.pop() if found else ""


def videomme_letter(output: str) -> str:
    """Read an option letter as Video-MME's authors do (``eval_your_results.py``).

    The first capital A to D counts, even inside a word. Before that, they remove openings of a sentence; none
    of these openings holds such a capital.

    >>> [videomme_letter(s) for s in ("B. left", "The best answer is: (C)", "A D", "b", "Best option: C")]
    ['B', 'C', 'A', '', 'B']
    """
    found = re.search("[ABCD]", output)
    return found[0] if found else ""


def mvbench_letter(output: str) -> str:
    """Read an option letter as MVBench's authors do (``check_ans`` of their notebook), in any case.

    The first word of the first line counts: a letter with or without brackets or dots, or a word that holds
    one in brackets. Their code begins every answer with "Best option:(" and takes a word without any letter
    for right; here it is wrong.

    >>> [mvbench_letter(s) for s in ("(B) left", "b.", "B) left", "(b)left", "B: left", "It is B", "(")]
    ['B', 'B', 'B', 'B', '', '', '']
    """
    word = output.strip().split("\n")[0].split(" ")[0].lower()
    found = re.search(r"\(([a-z])\)", word) or re.fullmatch(r"\(?([a-z])\)?", word.replace(".", ""))
    return found[1].upper() if found else ""


def tempcompass_letter(output: str) -> str:
    """Read an option letter as TempCompass's authors do (``eval_multi-choice.py``).

    A letter A to D counts alone, or at the start before a dot or a closing bracket.

    >>> [tempcompass_letter(s) for s in ("B", "B. left", "B) left", "(B) left", "b", "B left")]
    ['B', 'B', 'B', '', '', '']
    """
    found = re.match(r"([ABCD])(?:[.)]|$)", _said(output))
    return found[1] if found else ""


def yes_or_no(output: str) -> str:
    """Read the "yes" or "no" that an answer starts with, as TempCompass's authors do (``eval_yes_no.py``).

    >>> [yes_or_no(s) for s in ("Yes.", "no, he sits", "Not sure", "It is")]
    ['yes', 'no', 'no', '']
    """
    said = _said(output).lower()
    return next((word for word in ("yes", "no") if said.startswith(word)), "")


def matched_caption(output: str, options: Sequence[str]) -> str:
    """Find the option that an answer is, as TempCompass's authors do (``eval_caption_matching.py``).

    An answer is the whole option, its sentence (alone or after a bracket), its name, or the last word of its
    name. An answer may add dots to a name, and nothing else.

    >>> options = ["Caption A: It turns.", "Caption B: It stays."]
    >>> said = options[1], "It stays.", "(B) It stays.", "Caption B.", "B"
    >>> [matched_caption(s, options)[:9] for s in said]
    ['Caption B', 'Caption B', 'Caption B', 'Caption B', 'Caption B']
    >>> [matched_caption(s, options) for s in ("b", "It stays", "B. It stays.")]
    ['', '', '']
    """
    said = _said(output)
    behind = said.split(") ")[1] if ") " in said else said
    found = ""
    for option in options:
        name, _, sentence = option.partition(": ")
        whole = said in (option, sentence) or behind == sentence
        if whole or {said, said.replace(".", "")} & {name, name.rpartition(" ")[2]}:
            found = option
    return found


def _said(output: str) -> str:
    return output.replace("</s>", "").strip()


def names_option(output: str, answer: str, options: Sequence[str], *, match_case: bool = False) -> bool:
    """Tell whether an output names the right option, as FAVOR-Bench's authors do (``inference_qa_qwen.py``).

    The answer's text must appear in the output, and no longer option that contains it may. Case never matters
    in the output. But in their code, case matters in the search for options that contain the answer.
    ``match_case`` does the same, so that "high jump" then counts for "Jump" although "High jump" is an
    option.

    >>> options = ["He jumps", "He jumps twice", "He sits"]
    >>> names_option("HE JUMPS.", "He jumps", options), names_option("he jumps twice", "He jumps", options)
    (True, False)
    """
    said, wanted = output.lower(), answer.lower()
    if wanted not in said:
        return False
    for option in options:
        low = option.lower()
        longer = option != answer and answer in option if match_case else low != wanted and wanted in low
        if longer and low in said:
            return False
    return True


def same_text(output: str, answer: str) -> bool:
    """Whether two texts agree but for case, spacing and punctuation; the toy world's rule.

    >>> same_text("the red circle", "The red  circle.")
    True
    """
    table = str.maketrans("", "", string.punctuation)
    said, wanted = (text.translate(table).lower().split() for text in (output, answer))
    return said == wanted
