"""The pages in a real browser: headless Chromium, over file://. Run by `make test-browser`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

import reports
import rich_report
import swept
from qexport.artifact.figures import Verdict
from qexport.reporting.comparison import compare, comparison_html
from qexport.reporting.html import report_html

QUIET: Final = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PHONE: Final = 360
DESKTOP: Final = 1200
A4: Final = 720
"""Points of CSS between the margins of a sheet."""

CUT_OFF: Final = """return [...document.querySelectorAll('.card')].filter(card => {
    const right = card.getBoundingClientRect().right
    return [...card.querySelectorAll('th, td')].some(cell => cell.getBoundingClientRect().right > right)
}).map(card => card.textContent.slice(0, 40))"""
"""The cards out of which a table hangs."""

VERDICTS: Final[tuple[Verdict, ...]] = ("pass", "fail", "undecided")
SCHEMES: Final = ("light", "dark")


class Browser:
    """A page that is open, and what happened while it opened."""

    def __init__(self, driver: webdriver.Chrome, folder: Path) -> None:
        self.driver = driver
        self._page = folder / "page.html"

    def open(self, page: str, *, width: int = DESKTOP, scheme: str = "light", media: str = "screen") -> None:
        self._page.write_text(page, encoding="utf-8")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        self._drain()
        self.driver.get(self.address)
        WebDriverWait(self.driver, 30).until(lambda _: self.run("return document.readyState") == "complete")

    def _drain(self) -> None:
        self.driver.get("about:blank")
        for log in ("performance", "browser"):
            self.driver.get_log(log)

    @property
    def address(self) -> str:
        return self._page.as_uri()

    def requests(self) -> list[str]:
        """The addresses that were asked for since the page was opened."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """What the console said."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def style(self, selector: str, name: str) -> str:
        script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
        return str(self.run(script, selector, name))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary, driver_binary = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver_binary:
        pytest.exit("Chromium and its driver are needed: apt-get install chromium chromium-driver", returncode=1)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for option in (*QUIET, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_binary))
    yield Browser(driver, tmp_path_factory.mktemp("pages"))
    driver.quit()


@pytest.fixture(scope="session")
def rich() -> str:
    return report_html(rich_report.rich_report())


@pytest.fixture(scope="session")
def small() -> str:
    return report_html(reports.report())


@pytest.fixture(scope="session")
def compared() -> str:
    hostile = reports.subject().model_copy(update={"name": rich_report.LONG_WORD, "method": rich_report.SCRIPT})
    return comparison_html(compare([reports.report(), rich_report.rich_report(), reports.report(subject=hostile)]))


@pytest.fixture(scope="session")
def sweep() -> str:
    return swept.page()


@pytest.fixture(params=["rich", "small", "compared", "sweep"])
def page(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def of_verdict(verdict: Verdict) -> str:
    return report_html(reports.report([reports.gate_result(verdict=verdict)]))


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it, of `rgb(r, g, b)`."""
    channels = [int(channel) / 255 for channel in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(text: str, ground: str) -> float:
    lighter, darker = sorted((luminance(text), luminance(ground)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_a_page_asks_for_nothing_and_the_console_is_silent(browser: Browser, page: str) -> None:
    browser.open(page)
    assert browser.requests() == [browser.address]
    assert browser.complaints() == []
    assert browser.run("return document.scripts.length") == 0


def test_a_request_would_be_seen(browser: Browser, small: str) -> None:
    image = '<img src="https://nowhere.invalid/x.png"></body>'
    browser.open(re.sub(r"<meta http-equiv[^>]*>", "", small).replace("</body>", image))
    assert "https://nowhere.invalid/x.png" in browser.requests()


def test_the_policy_stops_what_would_be_loaded(browser: Browser, small: str) -> None:
    browser.open(small.replace("</body>", '<script>document.title = "caught"</script></body>'))
    WebDriverWait(browser.driver, 10).until(lambda _: "Content Security Policy" in " ".join(browser.complaints()))
    assert browser.driver.title != "caught"


def test_light_and_dark_differ(browser: Browser, rich: str) -> None:
    grounds = []
    for scheme in SCHEMES:
        browser.open(rich, scheme=scheme)
        grounds.append(luminance(browser.style("body", "backgroundColor")))
    assert grounds[0] > 0.8
    assert grounds[1] < 0.05


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("verdict", VERDICTS)
def test_the_verdict_can_be_read(browser: Browser, verdict: Verdict, scheme: str) -> None:
    browser.open(of_verdict(verdict), scheme=scheme)
    word = {"pass": "Passed", "fail": "Failed", "undecided": "Undecided"}[verdict]
    assert browser.driver.find_element(By.CSS_SELECTOR, "#verdict strong").text == word
    ground = browser.style("#verdict", "backgroundColor")
    assert contrast(browser.style("#verdict strong", "color"), ground) >= 4.5
    assert contrast(browser.style("#verdict p", "color"), ground) >= 4.5
    chip = browser.style("#gates .chip", "backgroundColor")
    assert contrast(browser.style("#gates .chip", "color"), chip) >= 4.5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_text_can_be_read(browser: Browser, rich: str, scheme: str) -> None:
    browser.open(rich, scheme=scheme)
    page_ground, card = browser.style("body", "backgroundColor"), browser.style(".card", "backgroundColor")
    for selector, ground in (("h1", page_ground), ("header p.soft", page_ground), ("nav a", page_ground),
                             (".card .soft", card), ("thead th", card), (".tile .value", card)):  # fmt: skip
        assert contrast(browser.style(selector, "color"), ground) >= 4.5, selector
    assert contrast(browser.style("svg .tick", "fill"), card) >= 4.5
    for mark in ("ins", "del", "mark"):
        assert contrast(browser.style(mark, "color"), browser.style(mark, "backgroundColor")) >= 4.5, mark


@pytest.mark.parametrize("width", [PHONE, 768, DESKTOP])
def test_no_width_needs_the_page_to_scroll_sideways(browser: Browser, page: str, width: int) -> None:
    browser.open(page, width=width)
    browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run("return innerWidth") == width


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_text_of_charts_stays_in_them(browser: Browser, page: str, width: int) -> None:
    browser.open(page, width=width)
    outside = browser.run(
        """return [...document.querySelectorAll('svg[role=img]')].flatMap(chart => {
            const card = chart.closest('figure').getBoundingClientRect()
            return [...chart.querySelectorAll('text')].filter(text => {
                const box = text.getBoundingClientRect()
                return box.left < card.left || box.right > card.right || box.bottom > card.bottom
            }).map(text => text.textContent)
        })"""
    )
    assert outside == []


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", ["rich", "sweep"])
def test_labels_of_a_chart_do_not_touch(
    browser: Browser, name: str, width: int, request: pytest.FixtureRequest
) -> None:
    browser.open(request.getfixturevalue(name), width=width)
    touching = browser.run(
        """const found = []
        for (const chart of document.querySelectorAll('svg[role=img]')) {
            const labels = [...chart.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()])
            labels.forEach(([one, a], i) => labels.slice(i + 1).forEach(([two, b]) => {
                const across = Math.min(a.right, b.right) - Math.max(a.left, b.left)
                const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top)
                if (across > 1 && down > 5) found.push(one + ' / ' + two)
            }))
        }
        return found"""
    )
    assert touching == []


def test_every_section_shows(browser: Browser, page: str) -> None:
    browser.open(page, width=PHONE)
    sections = browser.driver.find_elements(By.TAG_NAME, "section")
    assert sections
    for section in sections:
        assert section.is_displayed()
        assert section.size["height"] > 60, section.get_attribute("id")
    for chart in browser.driver.find_elements(By.CSS_SELECTOR, "svg[role=img]"):
        assert chart.size["width"] > 200
        assert chart.size["height"] > 80


def test_tiles_of_a_row_begin_on_one_line(browser: Browser, rich: str) -> None:
    browser.open(rich)
    tiles = browser.driver.find_elements(By.CLASS_NAME, "tile")
    tops = [tile.location["y"] for tile in tiles]
    assert len(tops) == 8
    assert len(set(tops)) == 2


def test_what_is_folded_opens(browser: Browser, rich: str) -> None:
    browser.open(rich)
    folded = browser.driver.find_elements(By.CSS_SELECTOR, "details:not([open])")
    assert len(folded) >= 5
    for details in folded:
        summary = details.find_element(By.TAG_NAME, "summary")
        if summary.is_displayed():
            before = details.size["height"]
            summary.click()
            assert details.size["height"] > before


def test_text_of_models_is_only_text(browser: Browser, rich: str) -> None:
    browser.open(rich)
    browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    shown = browser.driver.find_element(By.TAG_NAME, "body").text
    assert rich_report.SCRIPT in shown
    assert "⟨U+202E⟩right to left⟨U+202C⟩" in shown


def test_changes_show_without_colour(browser: Browser, rich: str) -> None:
    browser.open(rich)
    assert "line-through" in browser.style("del", "textDecorationLine")
    assert "underline" in browser.style("ins", "textDecorationLine")


def test_arabic_runs_from_right_to_left(browser: Browser) -> None:
    generations = rich_report.rich_report().generations
    assert generations is not None
    arabic = next(each for each in generations.comparisons if "\u0645" in each.prompt)
    only = generations.model_copy(update={"comparisons": [arabic]})
    browser.open(report_html(reports.report(generations=only)))
    assert browser.style(".pair .text", "direction") == "rtl"
    assert browser.style(".pair h4", "direction") == "ltr"


def test_printed_it_is_light_and_has_no_navigation(browser: Browser, rich: str) -> None:
    browser.open(rich, scheme="dark", media="print")
    assert luminance(browser.style("body", "backgroundColor")) == pytest.approx(1.0)
    assert contrast(browser.style("body", "color"), "rgb(255, 255, 255)") >= 7
    assert browser.style("nav", "display") == "none"


def test_a_printed_sweep_shows_every_column(browser: Browser, sweep: str) -> None:
    browser.open(sweep, width=A4, media="print")
    assert browser.run("return document.querySelectorAll('#variants thead th').length") == 10
    assert browser.run(CUT_OFF) == []


def test_a_sweep_needs_no_scrolling_on_a_desktop(browser: Browser, sweep: str) -> None:
    browser.open(sweep)
    assert browser.run(CUT_OFF) == []


def test_a_sweep_shows_its_variants_and_where_they_lie(browser: Browser, sweep: str) -> None:
    browser.open(sweep)
    assert browser.driver.find_element(By.ID, "plot").is_displayed()
    points = browser.driver.find_elements(By.CSS_SELECTOR, "#plot circle")
    assert len(points) == len(swept.MEASURED)
    assert all(point.is_displayed() and point.size["width"] > 5 for point in points)
    marks = browser.driver.find_elements(By.CSS_SELECTOR, "#plot .mark")
    assert [mark.text for mark in marks] == list(swept.MEASURED)
    links = browser.driver.find_elements(By.CSS_SELECTOR, "#variants a")
    assert [link.text for link in links] == list(swept.MEASURED)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_names_in_a_plot_can_be_read(browser: Browser, sweep: str, scheme: str) -> None:
    browser.open(sweep, scheme=scheme)
    card = browser.style(".card", "backgroundColor")
    for selector, colour in (("#plot .mark", "fill"), ("#variants a", "color"), ("#variants td", "color")):
        assert contrast(browser.style(selector, colour), card) >= 4.5, selector


@pytest.mark.parametrize(("name", "section"), [("rich", "#gates"), ("sweep", "#variants")])
def test_a_phone_shows_every_value(browser: Browser, name: str, section: str, request: pytest.FixtureRequest) -> None:
    browser.open(request.getfixturevalue(name), width=PHONE)
    hidden = browser.run(
        """return [...document.querySelectorAll(arguments[0] + ' td[data-label]')].filter(cell => {
            const box = cell.getBoundingClientRect()
            return box.left < 0 || box.right > innerWidth || cell.scrollWidth > cell.clientWidth
        }).map(cell => cell.textContent)""",
        section,
    )
    assert browser.run("return document.querySelectorAll(arguments[0] + ' td[data-label]').length", section)
    assert hidden == []
    label = "return getComputedStyle(document.querySelector(arguments[0] + ' td[data-label]'), '::before').content"
    assert browser.run(label, section) == {"#gates": '"value"', "#variants": '"size"'}[section]
