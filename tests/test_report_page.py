"""The page that ``swiprctl report`` writes, looked at in a real browser."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html.parser
import io
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

from swiprctl.commands.report import MARK, encoded
from tests.daemon import Daemon, wait_until

TEMPLATE = Path(__file__).parent.parent / "swiprctl" / "commands" / "report.html"
SECONDS = 3.0
"""What nobody should have to wait for, on a slow and busy machine."""

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # it does not start as root otherwise, and the page is our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-breakpad",
)

Picture = dict[str, Any]


def fill(report: dict[str, Any]) -> bytes:
    """Return the page of ``report``, as the command makes it."""
    before, after = TEMPLATE.read_bytes().split(MARK)
    return before + encoded(report) + b"\n" + after


def thumbnail(shade: int = 0, size: tuple[int, int] = (48, 32)) -> str:
    """Return a small JPEG, different for each ``shade`` below 4096, in base64."""
    colour = (shade % 16 * 16, shade // 16 % 16 * 16, 64 + shade // 256 % 16 * 8)
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def picture(name: str, *scores: float, href: str | None = None, shade: int = 0) -> Picture:
    """Return one picture of a report; of one score, the other label's is what is left of 1."""
    return {
        "name": name,
        "href": href,
        "scores": list(scores) if len(scores) > 1 else [1 - scores[0], scores[0]],
        "thumbnail": thumbnail(shade),
        "width": 48,
        "height": 32,
    }


def many(count: int) -> list[Picture]:
    """Return ``count`` pictures whose scores for `animal` rise from 0 with their number."""
    jpeg = thumbnail()
    return [
        {
            "name": f"beach/{i:04d}.jpg",
            "href": f"beach/{i:04d}.jpg",
            "scores": [1 - i / count, i / count],
            "thumbnail": jpeg,
            "width": 48,
            "height": 32,
        }
        for i in range(count)
    ]


def error(name: str, code: str = "not_an_image", message: str = "no picture") -> dict[str, str]:
    return {"name": name, "code": code, "message": message}


class Page:
    """One browser, in which reports are opened one after the other."""

    def __init__(self, browser: webdriver.Chrome, folder: Path) -> None:
        self.browser = browser
        self._path = folder / "report.html"

    def open(self, pictures: list[Picture], **changes: object) -> None:
        """Show a report of ``pictures``; ``changes`` are other members of it."""
        report = {
            "title": "holiday/",
            "made": "2026-11-25T04:10:00+00:00",
            "version": "0.1.0",
            "model": "sha256:" + "0123456789abcdef" * 4,
            "engine": "compiled",
            "precision": "fp32",
            "labels": ["other", "animal"],
            "pictures": pictures,
            "errors": [],
        }
        self._path.write_bytes(fill(report | changes))
        self.browser.get(self._path.as_uri())

    def window(self, width: int = 1280, height: int = 900) -> None:
        """Have a window of this many CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)

    def media(self, kind: str = "", **features: str) -> None:
        """Have the page be looked at as on paper, in the dark and so on."""
        pairs = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        self.devtools("Emulation.setEmulatedMedia", media=kind, features=pairs)

    def devtools(self, command: str, **parameters: object) -> Any:
        """Return the answer to a command of Chromium's own protocol."""
        return self.browser.execute_cdp_cmd(command, parameters)

    def run(self, script: str, *args: object) -> Any:
        """Return what a script returns that runs in the page."""
        return self.browser.execute_script(script, *args)

    def find(self, selector: str) -> WebElement:
        """Return the first such element."""
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """The visible text of the first such element."""
        return self.find(selector).text

    def texts(self, selector: str) -> list[str]:
        """The text of all such elements, visible or not."""
        texts: list[str] = self.run(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
        )
        return texts

    def names(self) -> list[str]:
        """The names on the cards that exist, in their order."""
        return self.texts("#cards .name")

    def press(self, *keys: str, holding: str = "") -> None:
        """Press ``keys`` one after the other, wherever the focus is."""
        chain = ActionChains(self.browser)
        if holding:
            chain.key_down(holding).send_keys(*keys).key_up(holding).perform()
        else:
            chain.send_keys(*keys).perform()

    def retype(self, selector: str, *keys: str) -> None:
        """Select what stands in a field and type ``keys`` in its place, as people do."""
        self.find(selector).click()
        self.press("a", holding=Keys.CONTROL)
        self.press(*keys)

    def focused(self) -> str:
        """The text of what has the focus."""
        text: str = self.run("return document.activeElement.textContent")
        return text

    def choose(self, selector: str, text: str) -> None:
        """Choose from a list."""
        Select(self.find(selector)).select_by_visible_text(text)

    def show(self, side: str) -> None:
        """Show all, what is above or what is below."""
        self.find(f"[name=side][value={side}]").click()

    def said(self) -> list[dict[str, Any]]:
        """What was written on the console since it was last asked."""
        entries: list[dict[str, Any]] = self.browser.get_log("browser")  # type: ignore[no-untyped-call]
        return entries

    def across(self) -> int:
        """How many cards stand side by side."""
        count: int = self.run(
            "return new Set([...document.querySelectorAll('.card')].map(e => e.offsetLeft)).size"
        )
        return count


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    """One Chromium for all tests here; it and all that it wrote are gone in the end."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    assert all(programs), "the tests need Debian's packages chromium and chromium-driver"
    home = tempfile.mkdtemp(prefix="swipr-")
    options = webdriver.ChromeOptions()
    options.binary_location = str(programs[0])
    for flag in (*FLAGS, f"--user-data-dir={home}/profile"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    places = dict.fromkeys(("HOME", "TMPDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"), home)
    service = Service(str(programs[1]), env={**os.environ, **places})
    try:
        # Without keep-alive no connection is open between two commands, nor replaced in a test.
        driver = webdriver.Chrome(options=options, service=service, keep_alive=False)
        Daemon.running.add(service.process.pid)
        try:
            yield driver
        finally:
            driver.quit()
            Daemon.running.discard(service.process.pid)
            wait_until(lambda: not _processes_of(home), "the browser's processes to end")
    finally:
        shutil.rmtree(home)


def _processes_of(home: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if home.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


@pytest.fixture
def page(browser: webdriver.Chrome, folder: Path) -> Iterator[Page]:
    """A window of the usual size and nothing said on the console, before and after."""
    page = Page(browser, folder)
    page.window()
    page.media()
    yield page
    said = page.said()
    browser.get("about:blank")
    assert said == []


ZOO = [
    picture("zoo/cat10.jpg", 0.4, shade=1),
    picture("zoo/cat9.jpg", 0.9, shade=2),
    picture("Dog.jpg", 0.6, shade=3),
    picture("cup.jpg", 0.1, shade=4),
]


def test_pictures_are_sorted_by_score(page: Page) -> None:
    """The highest of the last label comes first, with its numbers and its thumbnail."""
    page.open(ZOO)
    assert page.names() == ["zoo/cat9.jpg", "Dog.jpg", "zoo/cat10.jpg", "cup.jpg"]
    assert page.texts(".card:first-child dt") == ["animal", "other"]
    assert page.texts(".card:first-child dd") == ["0.900", "0.100"]
    loaded = "return [...document.images].map(i => [i.complete, i.naturalWidth, i.width > 48])"
    assert page.run(loaded) == [[True, 48, True]] * 4


def test_the_header_says_what_was_scored_by_what(page: Page) -> None:
    """Title, counts, model, engine, precision and date; the whole digest on demand."""
    page.open(ZOO, errors=[error("broken.jpg")])
    assert page.browser.title == "holiday/ - Swipr report"
    assert page.text("h1") == "holiday/"
    assert page.text("header .quiet") == "4 pictures 1 error"
    assert page.text("#engine") == "compiled"
    assert page.text("#precision") == "fp32"
    assert page.text("#made") == "25 Nov 2026, 04:10 UTC"
    assert page.text("#model") == "sha256:0123456789ab…"
    page.find("#model summary").click()
    assert page.text("#model").endswith("sha256:" + "0123456789abcdef" * 4)


def test_the_order_can_be_chosen(page: Page) -> None:
    """Lowest first, and by name as people count: 9 before 10."""
    page.open(ZOO)
    page.choose("#order", "Lowest first")
    assert page.names() == ["cup.jpg", "zoo/cat10.jpg", "Dog.jpg", "zoo/cat9.jpg"]
    page.choose("#order", "By name")
    assert page.names() == ["cup.jpg", "Dog.jpg", "zoo/cat9.jpg", "zoo/cat10.jpg"]


def test_the_label_can_be_chosen(page: Page) -> None:
    """Another label is another order, another histogram and other counts."""
    page.open(ZOO)
    page.choose("#label", "other")
    assert page.names() == ["cup.jpg", "zoo/cat10.jpg", "Dog.jpg", "zoo/cat9.jpg"]
    assert page.texts(".card:first-child dt") == ["other", "animal"]
    assert page.text("#counts") == "2 at or above, 2 below"
    histogram = page.find("#histogram").get_attribute("aria-label")
    assert histogram is not None
    assert histogram.startswith("Histogram of the scores for other: 4 pictures from 0.100 to 0.900")


def test_of_many_labels_the_highest_are_shown(page: Page) -> None:
    """It starts with the highest mean; a card has that label and the seven highest others."""
    labels = [f"label {i}" for i in range(1000)]
    scores = [[(i * 7 + shift) % 1000 / 1e6 for i in range(1000)] for shift in range(3)]
    for row in scores:
        row[500] = 0.5
    page.open([picture(f"{i}.jpg", *row) for i, row in enumerate(scores)], labels=labels)
    assert Select(page.find("#label")).first_selected_option.text == "label 500"
    first = page.texts(".card:first-child dt")
    best = sorted(range(1000), key=lambda i: -scores[0][i])[:8]
    assert first == [f"label {i}" for i in best]
    page.choose("#label", "label 3")
    assert page.texts(".card:first-child dt")[:2] == ["label 3", "label 500"]
    assert len(page.texts(".card:first-child dt")) == 8


def test_the_slider_counts_both_sides(page: Page) -> None:
    """Each key moves it by a hundredth; counts and marks follow."""
    page.open(ZOO)
    assert page.text("#counts") == "2 at or above, 2 below"
    assert page.texts(".card.below .name") == ["zoo/cat10.jpg", "cup.jpg"]
    slider = page.find("#slider")
    slider.send_keys(Keys.ARROW_RIGHT * 10)
    assert page.text("#counts") == "2 at or above, 2 below"  # 0.6 is at 0.6
    slider.send_keys(Keys.ARROW_RIGHT)
    assert page.text("#counts") == "1 at or above, 3 below"
    assert page.find("#threshold").get_property("value") == "0.61"
    assert slider.get_attribute("aria-valuetext") == "0.61: 1 at or above, 3 below"
    slider.send_keys(Keys.HOME)
    assert page.text("#counts") == "4 at or above, 0 below"
    assert page.texts(".card.below") == []


def test_the_threshold_can_be_typed(page: Page) -> None:
    """More finely than the slider moves; what is no number yet changes nothing."""
    page.open([picture("a.jpg", 0.1234), picture("b.jpg", 0.1236)])
    field = page.find("#threshold")
    page.retype("#threshold", Keys.BACKSPACE)
    assert page.text("#counts") == "0 at or above, 2 below"
    page.press("0.1235")
    assert page.text("#counts") == "1 at or above, 1 below"
    assert page.find("#slider").get_property("value") == "0.12"
    page.retype("#threshold", "7", Keys.TAB)
    assert field.get_property("value") == "1"
    page.retype("#threshold", Keys.BACKSPACE, Keys.TAB)
    assert field.get_property("value") == "1"


def test_a_click_in_the_histogram_sets_the_threshold(page: Page) -> None:
    """The line stands where it was clicked, and the slider under it."""
    page.open(ZOO)
    plot = page.find("#histogram")
    right = int(plot.rect["width"] / 4) + 1  # of the middle
    ActionChains(page.browser).move_to_element_with_offset(plot, right, 0).click().perform()
    assert page.find("#threshold").get_property("value") == "0.75"
    assert page.text("#counts") == "1 at or above, 3 below"
    assert page.text("#bin") == "0.750 to 0.775: 0"
    middle = "const r = e => document.querySelector(e).getBoundingClientRect();"
    line = page.run(middle + "return r('#cut').left")
    assert line == pytest.approx(plot.rect["x"] + 0.75 * plot.rect["width"], abs=2)


def test_the_histogram_counts(page: Page) -> None:
    """A bar per bin that is not empty, and in words the range, the median and the fullest bin."""
    page.open([picture(f"{i}.jpg", score) for i, score in enumerate((0, 0.01, 0.02, 0.51, 1))])
    path = page.find("#histogram .low").get_attribute("d")
    assert path is not None
    assert path.count("M") == 3
    assert page.find("#histogram").get_attribute("aria-label") == (
        "Histogram of the scores for animal: 5 pictures from 0.000 to 1.000, half of them at or "
        "above 0.020; most, 3, between 0.000 and 0.025"
    )


def test_plain_numbers_have_their_own_scale(page: Page) -> None:
    """Scores beyond 0 to 1 are not probabilities: the scale is that of the data."""
    page.open([picture("a.jpg", -3.17, 2.0), picture("b.jpg", 0.5, 12.34)])
    slider = page.find("#slider")
    assert [slider.get_attribute(name) for name in ("min", "max")] == ["-3.2", "12.4"]
    assert page.text("#counts") == "1 at or above, 1 below"
    assert page.texts(".card:first-child dd") == ["12.34", "0.50"]
    slider.send_keys(Keys.HOME)
    assert page.text("#counts") == "2 at or above, 0 below"


def test_each_side_can_be_shown_alone(page: Page) -> None:
    """All, at or above, or below; it stays so while the threshold moves."""
    page.open(ZOO)
    page.show("above")
    assert page.names() == ["zoo/cat9.jpg", "Dog.jpg"]
    page.show("below")
    assert page.names() == ["zoo/cat10.jpg", "cup.jpg"]
    page.find("#slider").send_keys(Keys.HOME)
    assert page.names() == []
    assert page.text("#none").startswith("No picture matches")
    page.show("all")
    assert len(page.names()) == 4
    assert page.text("#none") == ""


def test_names_can_be_searched(page: Page) -> None:
    """Large and small letters are the same; counts and histogram are of what matches."""
    page.open(ZOO)
    page.find("#filter").send_keys("ZOO/Cat")
    assert page.names() == ["zoo/cat9.jpg", "zoo/cat10.jpg"]
    assert page.text("#matches") == "2 of 4 names match"
    assert page.text("#counts") == "1 at or above, 1 below"
    assert ": 2 pictures" in str(page.find("#histogram").get_attribute("aria-label"))
    page.retype("#filter", Keys.ENTER, Keys.BACKSPACE)
    assert len(page.names()) == 4
    assert page.text("#matches") == ""


def test_the_keyboard_walks_over_the_cards(page: Page) -> None:
    """Tab leads to one card, arrows to the others, also to those that do not exist yet."""
    page.open(many(1001))
    across = page.across()
    assert 1000 % across == 0  # the last card stands alone in its row
    names = [f"beach/{i:04d}.jpg" for i in reversed(range(1001))]
    page.find("#filter").click()
    page.press(Keys.TAB)
    assert page.focused() == names[0]
    for key, place in (
        (Keys.ARROW_RIGHT, 1),
        (Keys.ARROW_DOWN, 1 + across),
        (Keys.ARROW_LEFT, across),
        (Keys.ARROW_UP, 0),
        (Keys.ARROW_UP, 0),
        (Keys.END, 1000),
        (Keys.ARROW_RIGHT, 1000),
        (Keys.ARROW_DOWN, 1000),
        (Keys.ARROW_UP, 1000 - across),
        (Keys.ARROW_RIGHT, 1001 - across),
        (Keys.ARROW_DOWN, 1000),
        (Keys.HOME, 0),
    ):
        page.press(key)
        assert page.focused() == names[place]
        assert page.run(
            "const {top, bottom} = document.activeElement.closest('li').getBoundingClientRect();"
            "return top >= 0 && bottom <= innerHeight"
        )
        assert len(page.texts('.name[tabindex="0"]')) == 1
    outline = "return getComputedStyle(document.activeElement.closest('li')).outlineStyle"
    assert page.run(outline) == "solid"
    page.press(Keys.TAB, holding=Keys.SHIFT)
    assert page.run("return document.activeElement.id") == "filter"


def test_the_focus_stays_where_it_is_while_cards_come_and_go(page: Page) -> None:
    """The card that has it is kept, however far the page is scrolled."""
    page.open(many(1000))
    page.find("#filter").click()
    page.press(Keys.TAB)
    page.run("scrollTo(0, 20000)")
    wait_until(lambda: page.names()[1] < "beach/0900.jpg", "other cards")
    assert page.focused() == "beach/0999.jpg"
    page.press(Keys.ARROW_RIGHT)
    assert page.focused() == "beach/0998.jpg"


def test_enter_opens_the_picture(page: Page, folder: Path) -> None:
    """In a window of its own, which cannot reach back."""
    (folder / "a b.jpg").write_bytes(base64.b64decode(thumbnail()))
    page.open([picture("a b.jpg", 0.9, href="a%20b.jpg"), picture("no link.jpg", 0.1)])
    here = page.browser.current_window_handle
    page.find(".name").send_keys(Keys.ENTER)
    wait_until(lambda: len(page.browser.window_handles) == 2, "the picture's window")
    (other,) = set(page.browser.window_handles) - {here}
    page.browser.switch_to.window(other)
    wait_until(lambda: page.browser.current_url.startswith("file:"), "the picture")
    assert page.browser.current_url == (folder / "a b.jpg").as_uri()
    assert page.run("return opener") is None
    page.browser.close()
    page.browser.switch_to.window(here)
    page.press(Keys.ARROW_RIGHT, Keys.ENTER)
    assert page.focused() == "no link.jpg"
    assert page.browser.window_handles == [here]


def test_slash_leads_to_the_name_filter(page: Page) -> None:
    """From anywhere but from where a slash is typed."""
    page.open(ZOO)
    page.press("/")
    assert page.run("return document.activeElement.id") == "filter"
    page.press("o/c")
    assert page.names() == ["zoo/cat9.jpg", "zoo/cat10.jpg"]
    assert "filter by name" in page.text(".keys")


def test_thumbnails_are_made_when_they_come_near(page: Page) -> None:
    """Of 5,000 a few exist; after scrolling there are others, and as few."""
    page.open(many(5000))
    first = page.names()
    assert first[0] == "beach/4999.jpg"
    assert 4 <= len(page.run("return document.images")) < 60
    page.run("scrollTo(0, document.body.scrollHeight / 2)")
    wait_until(lambda: page.names()[-1] < "beach/3500.jpg", "the cards in the middle")
    # The first stays, as Tab leads there.
    assert set(page.names()) & set(first) == {"beach/4999.jpg"}
    assert len(page.run("return document.images")) < 60
    seen = page.run(
        "return [...document.querySelectorAll('.card')].map(e => e.getBoundingClientRect())"
        ".filter(r => r.bottom > 0 && r.top < innerHeight && r.width > 100).length"
    )
    assert seen >= 2 * page.across()


def test_what_is_scrolled_does_not_jump(page: Page) -> None:
    """The page is as high from the start as it is when all has been seen."""
    page.open(many(300))
    height = page.run("return document.body.scrollHeight")
    for part in range(1, 6):
        page.run(f"scrollTo(0, {height} * {part} / 5)")
        assert page.run("return document.body.scrollHeight") == height
    wait_until(lambda: page.names()[-1] == "beach/0000.jpg", "the last card")
    assert page.run("return document.querySelector('.card:last-child').ariaSetSize") == "300"
    assert page.run("return document.querySelector('.card:last-child').ariaPosInSet") == "300"


def test_five_thousand_pictures_are_quick(page: Page) -> None:
    """The first cards, another order and another threshold are there in no time."""
    page.open(many(5000))
    assert page.text("#counts") == "2,500 at or above, 2,500 below"
    first = page.run("return performance.getEntriesByType('navigation')[0].domInteractive")
    assert first < 1000 * SECONDS
    took = page.run("""
      const act = (id, value, kind) => {
        const start = performance.now();
        const control = document.getElementById(id);
        control.value = value;
        control.dispatchEvent(new Event(kind, {bubbles: true}));
        document.querySelector('.card').getBoundingClientRect();
        return performance.now() - start;
      };
      return {
        sort: act('order', 'low', 'change'),
        name: act('order', 'name', 'change'),
        label: act('label', 0, 'change'),
        threshold: act('slider', 0.25, 'input'),
        filter: act('filter', '00', 'input'),
      };
    """)
    assert page.names()[0] == "beach/0000.jpg"
    assert {what: ms for what, ms in took.items() if ms > 1000 * SECONDS} == {}


HOSTILE = {
    "<img src=x onerror=window.pwned=1>.jpg": "<img src=x onerror=window.pwned=1>.jpg",
    "</script><script>window.pwned=1</script>": "</script><script>window.pwned=1</script>",
    "<!--<script>": "<!--<script>",
    "two\nlines\r\t\x1b[31m\x7f\x85": r"two\nlines\r\t\x1b[31m\x7f\x85",
    "\u202egpj.exe\u2066\u200b\ufeff": r"\u202egpj.exe\u2066\u200b\ufeff",
    "caf\udce9.jpg": r"caf\xe9.jpg",
    "line\u2028and\u2029paragraph\u00a0\u00ad": r"line\u2028and\u2029paragraph\xa0\xad",
    r"\x1b": r"\\x1b",
    "\U000e0041tag": r"\U000e0041tag",
    "été 日本 שלום 👍.jpg": "été 日本 שלום 👍.jpg",
    "__proto__": "__proto__",
}


def test_hostile_names_are_shown_and_do_nothing(page: Page) -> None:
    """Markup is text, and what would steer the text is escaped; wherever a name stands."""
    names = list(HOSTILE)
    pictures = [picture(name, 0.9 - i / 100) for i, name in enumerate(names)]
    page.open(
        pictures,
        errors=[error(name, name, name) for name in names],
        labels=names[:2],
        **dict.fromkeys(("title", "engine", "precision", "model", "version"), names[0]),
    )
    assert page.names() == list(HOSTILE.values())
    assert page.texts("#error-rows td:first-child") == list(HOSTILE.values())
    assert page.texts("#error-rows td:last-child") == list(HOSTILE.values())
    alts = page.run("return [...document.images].map(i => i.alt)")
    assert alts == [f"Thumbnail of {name}" for name in HOSTILE.values()]
    titles = page.run("return [...document.querySelectorAll('.name')].map(e => e.title)")
    assert titles == list(HOSTILE.values())
    assert page.text("h1") == names[0]
    assert page.run("return [typeof pwned, document.scripts.length]") == ["undefined", 2]
    page.find("#filter").send_keys(r"\u202E")
    assert page.names() == [r"\u202egpj.exe\u2066\u200b\ufeff"]


def test_only_paths_become_links(page: Page) -> None:
    """No scheme, however it is written, and no other host."""
    good = ["a.jpg", "../b/c%3Ad.jpg", "./javascript:alert(1)", "/srv/a.jpg", "a?b#c", "./a:b.jpg"]
    bad = [
        "javascript:window.pwned=1",
        "JaVaScRiPt:window.pwned=1",
        "java\nscript:window.pwned=1",
        " javascript:window.pwned=1",
        "\x01javascript:window.pwned=1",
        "data:text/html,<script>window.pwned=1</script>",
        "https://example.com/",
        "a:b.jpg",  # a scheme to a browser
        "//example.com/",
        "\\\\example.com/",
        "/\\example.com/",
        "/\t/example.com/",
        "",
    ]
    hrefs = good + bad
    page.open([picture(f"{i}", 0.9 - i / 100, href=href) for i, href in enumerate(hrefs)])
    found = page.run("return [...document.links].filter(a => a.closest('#cards')).map(a => a.text)")
    assert found == [f"{i}" for i in range(len(good))]
    told = "return [...document.links].filter(a => a.closest('li')).map(a => a.target + a.rel)"
    assert set(page.run(told)) == {"_blanknoopener"}


def test_errors_are_listed_apart(page: Page) -> None:
    """With their number, open, and linked from the head of the page."""
    page.open(ZOO, errors=[error("c.jpg", "too_large", "240 megapixels"), error("d.jpg")])
    assert page.text("#error-count") == "2 errors"
    rows = page.run("return [...document.querySelectorAll('#error-rows tr')].map(r => r.innerText)")
    assert rows == ["c.jpg\ttoo_large\t240 megapixels", "d.jpg\tnot_an_image\tno picture"]
    page.find("#to-errors").click()
    assert page.run("return document.querySelector('#errors').getBoundingClientRect().top") < 900
    assert "c.jpg" not in page.names()
    page.open(ZOO)
    assert not page.find("#errors").is_displayed()
    assert not page.find("#to-errors").is_displayed()


def test_a_report_without_pictures_has_its_errors(page: Page) -> None:
    """And says that there are no pictures, without controls for them."""
    page.open([], errors=[error("c.jpg")])
    assert page.text("main") == "No picture was scored."
    assert page.text("header .quiet") == "0 pictures 1 error"
    assert page.texts("form, input, select") == []
    assert page.text("#error-rows") == "c.jpg not_an_image no picture"
    page.open([])
    assert page.text("main") == "No picture was scored."


def test_pictures_without_thumbnail_have_their_place(page: Page) -> None:
    """A card without one is as high, and says so."""
    bare = {**picture("bare.jpg", 0.9), "thumbnail": None, "width": None, "height": None}
    page.open([bare, *ZOO])
    assert page.texts(".card:first-child .frame") == ["no thumbnail"]
    heights = "return [...document.querySelectorAll('.card')].map(e => e.offsetHeight)"
    assert len(set(page.run(heights))) == 1


def test_one_label_and_equal_scores_are_no_exception(page: Page) -> None:
    """Neither a single label nor a scale without width."""
    page.open([picture("a.jpg", 7.5, 7.5)], labels=["x", "y"])
    assert page.texts(".card dd") == ["7.500", "7.500"]
    page.find("#slider").send_keys(Keys.HOME)
    assert page.text("#counts") == "1 at or above, 0 below"
    one = {**picture("a.jpg", 0.3), "scores": [0.3]}
    page.open([one], labels=["only"])
    assert page.text("#counts") == "0 at or above, 1 below"
    assert page.texts(".card dt") == ["only"]


CONTRAST = """
const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
const luminance = (colour) => channels(colour).slice(0, 3).map((c) => c / 255)
  .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const ground = (element) => {
  const colour = getComputedStyle(element).backgroundColor;
  return channels(colour)[3] === 0 ? ground(element.parentElement) : colour;
};
const ratio = (element) => {
  const [a, b] = [getComputedStyle(element).color, ground(element)].map(luminance);
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
};
const hasText = (element) => element.matches('select, [type=number], [type=search]')
  || [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
return [...document.body.querySelectorAll('*')]
  .filter((element) => element.checkVisibility() && !element.matches('option') && hasText(element))
  .map((element) => [element.textContent.trim().slice(0, 30), ratio(element)]);
"""


def test_light_and_dark_differ_and_both_can_be_read(page: Page) -> None:
    """All text has a contrast of at least 4.5 to 1, as WCAG AA has it."""
    grounds = set()
    page.open(ZOO, errors=[error("c.jpg")])
    for scheme in ("light", "dark"):
        page.media(prefers_color_scheme=scheme)
        grounds.add(page.run("return getComputedStyle(document.body).backgroundColor"))
        ratios = page.run(CONTRAST)
        assert len(ratios) > 50
        assert [pair for pair in ratios if pair[1] < 4.5] == []
    assert len(grounds) == 2


def test_motion_can_be_reduced(page: Page) -> None:
    """Nothing moves for those who do not want it."""
    page.open(ZOO)
    moves = (
        "return [...document.querySelectorAll('*')].map(e => getComputedStyle(e))"
        ".filter(s => s.animationName != 'none' || parseFloat(s.transitionDuration) > 0).length"
    )
    page.media(prefers_reduced_motion="no-preference")
    assert page.run(moves) > 0
    page.media(prefers_reduced_motion="reduce")
    assert page.run(moves) == 0


def test_nothing_is_asked_of_the_network(page: Page) -> None:
    """Whatever the page loads is in it; the policy forbids the rest."""
    page.open(ZOO, errors=[error("c.jpg")])
    page.find("#filter").send_keys("zoo")
    loaded: list[str] = page.run(
        "return performance.getEntriesByType('resource').map(e => e.name.slice(0, 5))"
    )
    assert set(loaded) <= {"data:", "blob:"}
    policy = page.find("meta[http-equiv]").get_attribute("content") or ""
    parts = [part.split() for part in policy.split(";")]
    assert {name: words for name, *words in parts if not name.endswith("-src")} == {
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }
    sources = {name: words for name, *words in parts if name.endswith("-src")}
    assert set(sources) == {"default-src", "img-src", "style-src", "script-src"}
    assert sources["default-src"] == ["'none'"]
    assert sources["img-src"] == ["data:"]


@pytest.mark.parametrize("element", ["style", "script"])
def test_the_policy_names_the_hash_of(element: str) -> None:
    """After a change of the style or the script its hash has to be changed as well."""
    text = TEMPLATE.read_text(encoding="utf-8")
    (inside,) = re.findall(f"<{element}>(.*?)</{element}>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
    stands = re.findall(f"{element}-src '(.*?)'", text)
    assert stands == [f"sha256-{digest}"], f"report.html must say {element}-src 'sha256-{digest}'"


def test_an_injected_script_is_not_run(page: Page) -> None:
    """Should a name ever come to be markup, the policy still stands before it."""
    page.open(ZOO)
    page.run("""
      const script = document.createElement('script');
      script.textContent = 'window.pwned = 1';
      document.body.append(script);
      const markup = '<img src="data:," onerror="window.pwned = 1">';
      document.body.insertAdjacentHTML('beforeend', markup);
    """)
    told: list[str] = []

    def both_are_told() -> bool:
        told.extend(entry["message"] for entry in page.said())
        return len(told) >= 2

    wait_until(both_are_told, "two complaints")
    assert all("Content Security Policy" in message for message in told)
    assert page.run("return typeof pwned") == "undefined"


def test_the_script_parses_no_markup() -> None:
    """What is shown is set as text, and nothing is evaluated."""
    text = TEMPLATE.read_text(encoding="utf-8")
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser"):
        assert word not in text
    assert not re.search(r"\beval\b|\bFunction\(|createContextualFragment|setHTML", text)
    assert re.findall(r"https?://[^'\"]*", text) == ["http://www.w3.org/2000/svg"]  # a name


def test_the_template_has_one_place_for_the_data() -> None:
    """A line of its own, in an element that is data."""
    text = TEMPLATE.read_text(encoding="utf-8")
    assert text.count("@DATA@") == 1
    assert f'<script type="application/json" id="data">\n{MARK.decode()}</script>' in text


class Structure(html.parser.HTMLParser):
    """Which elements are open, and which ids there are."""

    EMPTY = ("meta", "link", "input", "wbr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element that needs an end, or none."""
        self.ids.update(value for name, value in attrs if name == "id" and value)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element of SVG that ends where it starts."""

    def handle_endtag(self, tag: str) -> None:
        """The end of the last one that was begun."""
        assert self.open.pop() == tag


def test_each_element_ends_and_each_id_is_one() -> None:
    """No browser has to guess."""
    structure = Structure()
    structure.feed(TEMPLATE.read_text(encoding="utf-8"))
    structure.close()
    assert structure.open == []
    assert set(structure.ids.values()) == {1}


def test_helpers_of_all_kinds_find_their_way(page: Page) -> None:
    """What a checker of accessibility looks for first."""
    page.open(ZOO, errors=[error("c.jpg")])
    problems = page.run("""
      const all = (selector) => [...document.querySelectorAll(selector)];
      const named = (e) => e.labels?.length || e.ariaLabel || e.getAttribute('aria-labelledby');
      const ids = all('[id]').map((e) => e.id);
      const levels = all('h1, h2, h3').filter((e) => e.checkVisibility()).map((e) => e.tagName);
      return {
        unlabelled: all('input, select').filter((e) => !named(e)).map((e) => e.id),
        images: all('img').filter((e) => !e.alt || !e.width || !e.height).map((e) => e.src),
        twice: ids.filter((id, i) => ids.indexOf(id) !== i),
        missing: all('[for], [aria-describedby], [aria-labelledby]').filter((e) => !ids.includes(
          e.htmlFor ?? e.getAttribute('aria-describedby') ?? e.getAttribute('aria-labelledby'))),
        language: document.documentElement.lang === 'en' ? [] : ['no language'],
        headings: levels.join() === 'H1,H2,H2' ? [] : levels,
        landmarks: ['header', 'main', 'form[aria-label]', 'section[aria-labelledby]', 'footer']
          .filter((selector) => all(selector).length !== 1),
        lists: all('[role=list]').filter((e) => ![...e.children].every((c) => c.tagName === 'LI')),
        legends: all('fieldset').filter((e) => e.firstElementChild.tagName !== 'LEGEND'),
        headers: all('th').filter((e) => e.scope !== 'col'),
      };
    """)
    assert {what: found for what, found in problems.items() if found} == {}


def test_counts_are_spoken_when_they_have_come_to_rest(page: Page) -> None:
    """Once, not for each step of the slider."""
    page.open(ZOO)
    page.run(
        "window.told = []; new MutationObserver(() => told.push(document.querySelector("
        "'#status').textContent)).observe(document.querySelector('#status'), {childList: true})"
    )
    page.find("#slider").send_keys(Keys.ARROW_RIGHT * 20)
    last = "1 at or above, 3 below; 4 shown"
    wait_until(lambda: last in page.run("return told"), "the counts")
    assert page.run("return told").count(last) == 1
    assert page.find("#status").get_attribute("role") == "status"


def test_paper_has_all_cards_and_no_controls(page: Page) -> None:
    """Each picture is on it, also those that the window does not hold, and it is white."""
    pictures = [{**picture(f"{i}.jpg", i / 100, shade=37 * i)} for i in range(100)]
    page.open(pictures)
    page.media("print", prefers_color_scheme="dark")
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert len(page.names()) == 100
    assert page.find(".card").is_displayed()
    assert not page.find("#controls").is_displayed()
    assert (
        page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    )
    page.run("dispatchEvent(new Event('afterprint'))")
    page.media()
    printed = base64.b64decode(page.browser.print_page())
    assert len(re.findall(rb"/Subtype\s*/Image", printed)) == 100
    assert len(page.names()) < 100


def test_without_javascript_the_page_says_so(page: Page) -> None:
    """Rather than be blank."""
    page.devtools("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open(ZOO)
        assert page.find("noscript").text.startswith("This page needs JavaScript")
        assert not page.find("#page").is_displayed()
    finally:
        page.devtools("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (768, 1024), (390, 844), (360, 640)])
def test_the_page_fits_its_window(page: Page, width: int, height: int, scheme: str) -> None:
    """Nothing is wider, and two cards stand side by side even on a small telephone.

    Where SWIPR_SCREENSHOTS names a folder, that is where it can be looked at.
    """
    page.window(width, height)
    page.media(prefers_color_scheme=scheme)
    long = picture("folder/" + "name" * 60 + ".jpg", 0.99)
    broken = error("x" * 200, "not_an_image", "no picture " * 20)
    page.open([*ZOO, *many(60), long], errors=[broken])
    assert page.run("return document.documentElement.scrollWidth") <= width
    assert page.across() >= 2
    if place := os.environ.get("SWIPR_SCREENSHOTS"):
        shot = page.devtools("Page.captureScreenshot", format="png")
        file = Path(place) / f"report-{width}x{height}-{scheme}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(shot["data"]))
