"""The page as a reader meets it: opened from disk in a headless Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import FOUND, Browser, Page, open_browser
from look_support import MARKUP, make_views

from motionenhancer.report.page import write_page

pytestmark = pytest.mark.skipif(FOUND is None, reason="no Chromium is installed")

RUN = {
    "facts": [
        ["status", "finished"],
        ["teacher", MARKUP],
        ["λ, the weight of the alignment loss", "1, linear to 0"],
    ],
    "curves": {"loss_ar": [[1, 2.0], [2, 1.5], [3, None]], "lambda": []},
    "evaluation": None,
    "settings": [["identity.alignment_end_weight", MARKUP], ["seed", "42"]],
    "temperature": 0.25,
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_page(folder / "report.html", make_views(folder), "a run", RUN)
    return folder / "report.html"


@pytest.fixture
def page(browser: Browser, file: Path) -> Iterator[Page]:
    found = browser.open(file)
    found.wait("!!state.view.pictures && Object.values(state.view.maps.sources).every((one) => one.bytes)")
    yield found
    assert found.complaints() == []
    found.send("Page.close")


def pixel(page: Page, name: str, x: float, y: float) -> list[int]:
    """The colour of a map at shares of its width and height."""
    at = f"Math.floor({x} * canvas.width), Math.floor({y} * canvas.height), 1, 1"
    return page.run(
        f"(() => {{ const canvas = document.getElementById('map-{name}');"
        f" return [...canvas.getContext('2d').getImageData({at}).data].slice(0, 3); }})()"
    )


def pixels(page: Page) -> str:
    return page.run("['teacher', 'before', 'after'].map((name) => $(`map-${name}`).toDataURL()).join()")


def texts(page: Page, selector: str) -> list[str]:
    return page.run(f"[...document.querySelectorAll('{selector}')].map((one) => one.textContent)")


def choose(page: Page, name: str, value: object) -> None:
    page.run(f"$('{name}').value = '{value}'; $('{name}').dispatchEvent(new Event('input'))")


def shown(page: Page) -> list[str]:
    return texts(page, "#samples b")


def test_the_text_says_what_became_of_each_word(page: Page) -> None:
    assert texts(page, "#words .missing") == ["red"]
    assert texts(page, "#words .kept") == ["moves"]
    assert texts(page, "#words .dropped") == ["the", "square"]
    assert texts(page, "#words .cut") == [" — naïve ✓"]
    assert texts(page, "#legend p") == [
        "kept 1: the student follows the teacher's map of the word (scores 0.3333 to 0.3333).",
        "not found 1: the teacher keeps the word, but it is not among the student's tokens "
        "(scores 0.3000 to 0.3000).",
        "dropped 2: the word's motion score is lower than those of the kept words (scores 0.1000 to 0.1000).",
        "cut 1: the text was too long for the teacher, and the word comes after the cut.",
    ]
    assert page.run("$('words').textContent") == "the red square moves — naïve ✓"


def test_a_click_on_a_word_shows_its_maps(page: Page) -> None:
    # Of "moves", the word that scores highest, all have a map; "red" is not among the student's tokens.
    assert texts(page, "#words [aria-pressed=true]") == ["moves"]
    before = pixels(page)
    page.run("document.querySelector('#words .missing').click()")
    assert texts(page, "#words [aria-pressed=true]") == ["red"]
    assert pixels(page) != before
    assert texts(page, "figcaption") == [
        "teacher",
        "student before: no map of this word",
        "student after: no map of this word",
    ]
    assert "is not found: the teacher keeps the word, but it is" in page.run("$('about').textContent")


def test_the_overlay_lies_where_the_map_is_at_that_time(page: Page) -> None:
    choose(page, "opacity", 1)
    yellow = [0xFD, 0xE7, 0x25]
    choose(page, "time", 0)
    assert pixel(page, "teacher", 0.02, 0.02) == yellow
    assert pixel(page, "teacher", 0.98, 0.98) != yellow
    assert pixel(page, "after", 0.98, 0.98) == yellow, "cell 5 of a grid of 2 x 3 is its last"
    choose(page, "time", 3)
    assert pixel(page, "teacher", 0.02, 0.02) == yellow, "0.75 s is no nearer to the second frame"
    page.run("$('smooth').click()")
    assert pixel(page, "teacher", 0.02, 0.02) == pixel(page, "teacher", 0.98, 0.98), "half of each"
    assert pixel(page, "teacher", 0.02, 0.02) not in (yellow, pixel(page, "teacher", 0.5, 0.5))
    page.run("$('smooth').click()")
    choose(page, "time", 7)
    assert page.run("$('clock').textContent") == "1.75 s of 2.00 s"
    assert pixel(page, "teacher", 0.02, 0.02) != yellow
    assert pixel(page, "teacher", 0.98, 0.98) == yellow
    assert pixel(page, "after", 0.98, 0.98) != yellow


def test_all_maps_have_one_scale(page: Page) -> None:
    """A map that is the same everywhere is drawn dark beside one that is all in one cell."""
    choose(page, "opacity", 1)
    choose(page, "time", 0)
    assert pixel(page, "after", 0.98, 0.98) == [0xFD, 0xE7, 0x25]
    red, green, blue = pixel(page, "before", 0.98, 0.98)
    assert blue > green, "a twelfth of the scale is the dark end of viridis"
    assert page.run("$('top').textContent") == "12.0 × the map's mean"
    choose(page, "contrast", 3)
    assert page.run("$('top').textContent") == "1.5 × the map's mean"
    assert pixel(page, "before", 0.98, 0.98) != [red, green, blue]


def test_the_teachers_map_as_it_is_followed(page: Page) -> None:
    """The map is raised to the fourth, for a temperature of 0.25: a cell of lower mass nearly vanishes."""
    page.run("state.view.maps.sources.teacher.bytes.fill(0).set([255, 180], 24)")
    page.run("state.view.maps.peaks[1] = state.view.maps.tops[1] = 1")
    found = []
    for _ in range(2):
        found.append(page.run("densities('teacher', state.view.maps.sources.teacher, 1, 1).slice(0, 3)"))
        page.run("$('sharpen').click()")
    assert found[0] == pytest.approx([1, (180 / 255) ** 2, 0])
    share = (180 / 255) ** 8
    assert found[1] == pytest.approx([24 / (1 + share), 24 * share / (1 + share), 0])
    assert not page.run("$('followed').hidden")


def test_the_slider_and_the_switches_change_the_pixels(page: Page) -> None:
    seen = {pixels(page)}
    for name, value in (("time", 1), ("opacity", 0.3), ("contrast", 2), ("colours", "cividis")):
        choose(page, name, value)
        seen.add(pixels(page))
    page.run("$('smooth').click()")
    seen.add(pixels(page))
    assert len(seen) == 6


def test_samples_are_filtered_and_sorted(page: Page) -> None:
    everything = ["good", MARKUP, "plain"]
    assert shown(page) == everything
    assert page.run("$('count').textContent") == "3 of 3"
    for name, value, left in (
        ("task", "jump", [MARKUP]),
        ("change", "worse", [MARKUP]),
        ("change", "better", ["good"]),
        ("before", "right", [MARKUP]),
        ("after", "wrong", [MARKUP]),
        ("after", "right", ["good"]),
        ("confidence", 0.5, [MARKUP, "plain"]),
    ):
        choose(page, name, value)
        assert shown(page) == left, (name, value)
        choose(page, name, 0 if name == "confidence" else "")
    choose(page, "task", "turn")
    choose(page, "change", "worse")
    assert shown(page) == []
    assert page.run("$('count').textContent") == "0 of 3"
    choose(page, "task", "")
    choose(page, "change", "")
    for order, expected in (
        ("worst", [MARKUP, "good", "plain"]),
        ("best", ["good", MARKUP, "plain"]),
        ("confidence", [MARKUP, "good", "plain"]),
        ("task", ["plain", MARKUP, "good"]),
    ):
        choose(page, "sort", order)
        assert shown(page) == expected, order


def test_markup_of_a_data_file_is_text(page: Page, file: Path) -> None:
    assert file.read_text().count("</script>") == 2
    page.press("ArrowDown")
    assert page.run("document.title") == "a run"
    assert page.run("$('words').textContent") == MARKUP
    assert page.run("document.querySelectorAll('header img, #layout img, #layout b b, #run img').length") == 0
    assert MARKUP in page.run("$('settings').textContent")
    assert MARKUP in page.run("$('facts').textContent")
    assert MARKUP in page.run("$('figures').textContent")


def test_the_keyboard_is_enough(page: Page) -> None:
    start = page.run("state.frame")
    page.press("ArrowRight")
    page.press("ArrowRight")
    page.press("ArrowLeft")
    assert page.run("state.frame") == start + 1
    page.press("p")
    assert texts(page, "#words [aria-pressed=true]") == ["red"]
    page.press("n")
    assert texts(page, "#words [aria-pressed=true]") == ["moves"]
    before = pixels(page)
    page.press("o")
    hidden = pixels(page)
    assert hidden != before
    page.press("o")
    page.press("s")
    assert page.run("$('smooth').checked")
    page.press(" ")
    page.wait(f"state.frame !== {start + 1}")
    assert page.run("$('play').textContent") == "Stop"
    page.press(" ")
    assert page.run("$('play').textContent") == "Play"
    page.press("ArrowDown")
    page.press("ArrowDown")
    assert page.run("$('name').textContent") == "plain"
    page.press("ArrowUp")
    assert page.run("$('name').textContent").startswith(MARKUP)
    # Each word and sample is a button that Tab reaches.
    page.run("document.activeElement.blur()")
    reached = set()
    for _ in range(16):
        page.press("Tab")
        reached.add(page.run("document.activeElement.id || document.activeElement.closest('ul, #words').id"))
    assert {"sort", "task", "confidence", "samples", "words"} <= reached


def test_the_figures_answer_what_is_asked(page: Page) -> None:
    figures = page.run("$('figures').textContent")
    for part in ("1.0000", "0.5000", "-0.5000 better", "0.2500", "it moves (wrong)", "(right)"):
        assert part in figures, part
    assert "2 of 4 heads are kept (dark bars: 0, 3)" in page.run("$('heads').textContent")
    assert page.run("document.querySelectorAll('#bars svg').length") == 4
    assert page.run("document.querySelectorAll('.bar.chosen').length") == 4 * 2
    assert "better for 1, worse for 1. Right answers: 1 before, 1 after." in page.run(
        "$('summary').textContent"
    )
    assert "read by 2 steps of inversion and 2 steps of reconstruction" in page.run("$('heads').textContent")
    assert "maps: 0.200, from 0 to 1" in figures
    assert texts(page, "#curves h3") == ["Loss of the answers"]
    assert texts(page, "#curves .note") == ["loss_ar: 2.0000 → 1.5000"]
    assert texts(page, "#facts li") == [" ".join(fact) for fact in RUN["facts"]]
    assert texts(page, "#settings tr:last-child td") == ["seed", "42"]


@pytest.mark.parametrize("width", [1300, 420])
def test_nothing_overflows(page: Page, tmp_path: Path, width: int) -> None:
    page.size(width, 900)
    page.run("$('settings').open = true")
    assert page.run("document.documentElement.scrollWidth") <= width
    heights = page.run(
        "[...document.querySelectorAll('#settings td:first-child')].map((one) => one.offsetHeight)"
    )
    assert max(heights) < 35, "a setting's name is on one line"
    assert len(page.shoot(tmp_path / "page.png")) > 10_000


def test_a_long_text_leaves_room_for_the_maps(page: Page) -> None:
    page.size(420, 900)
    word = "({ text: 'word ', state: 'kept', row: at === 299 ? 1 : 0 })"
    page.run(f"state.view.words = Array.from({{ length: 300 }}, (_, at) => {word}); drawWords()")
    box, last = page.run(
        "[$('words'), [...document.querySelectorAll('#words button')].pop()]"
        ".map((one) => one.getBoundingClientRect().toJSON())"
    )
    assert box["height"] < 0.4 * 900
    assert box["top"] <= last["top"] < last["bottom"] <= box["bottom"], "the chosen word is in sight"


def test_a_page_of_one_prior_without_its_clip(browser: Browser, tmp_path: Path) -> None:
    view = make_views(tmp_path)[0]
    write_page(tmp_path / "one.html", [type(view).of_prior(view.prior)], "a prior")
    page = browser.open(tmp_path / "one.html")
    page.wait("!!state.view.maps.sources.teacher.bytes")
    assert page.run("document.querySelectorAll('#maps figure:not([hidden])').length") == 1
    assert pixel(page, "teacher", 0.98, 0.98) != pixel(page, "teacher", 0.5, 0.5)
    assert page.run("$('clock').textContent") == "1.50 s of 1.50 s"
    assert page.complaints() == []
