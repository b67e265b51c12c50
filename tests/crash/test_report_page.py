"""The report in a real browser: it loads without a complaint, its rows open, and the keyboard is enough."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

import judges
from cowfence.crash.campaign import explore
from cowfence.crash.campaign_report import report_of
from cowfence.crash.cases import parse_case
from cowfence.crash.report import Report, write_report
from cowfence.crash.unit import Settings
from crash import report_samples
from crash.test_campaign import without_the_prepare_fence


@pytest.fixture(scope="module")
def browser() -> Iterator[WebDriver]:
    options = Options()
    options.binary_location = judges.require("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(judges.require("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def load(browser: WebDriver, folder: Path, report: Report, fragment: str = "") -> None:
    path = folder / "report.html"
    write_report(report, path)
    browser.get("about:blank")
    browser.get(path.as_uri() + fragment)


def found_without_a_fence() -> Report:
    """A real page: two violations of an engine without the fence between PREPARE and LINK."""
    cases = [parse_case(f"v3,c512,r16,t64,aged | {script}") for script in ("write:3072+512 flush", "write:1024+512 reopen")]
    with without_the_prepare_fence():
        return report_of(explore([("two", cases)], Settings(), jobs=1), "cowfence crash explore --suite two")


def one(browser: WebDriver, selector: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, selector)


def complaints(browser: WebDriver) -> str:
    return json.dumps(browser.get_log("browser"))  # type: ignore[no-untyped-call]


def is_open(browser: WebDriver, selector: str) -> bool:
    return one(browser, selector).get_attribute("open") is not None


@pytest.mark.parametrize("width", [1280, 500])
@pytest.mark.parametrize("sample", ["clean", "broken", "hostile"])
def test_it_loads_without_a_complaint_and_fits(browser: WebDriver, tmp_path: Path, sample: str, width: int) -> None:
    browser.set_window_size(width, 1000)
    load(browser, tmp_path, getattr(report_samples, sample)())
    assert complaints(browser) == "[]"
    assert browser.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.title != "taken"
    assert (
        one(browser, ".verdict").text == {"clean": "No violation", "broken": "3 violations", "hostile": "1 violation"}[sample]
    )


def test_a_violation_opens_by_click_by_key_and_by_address(browser: WebDriver, tmp_path: Path) -> None:
    load(browser, tmp_path, report_samples.broken(), "#open=2")
    assert [is_open(browser, f"#v{number}") for number in (1, 2, 3)] == [False, True, False]
    assert one(browser, "#v2 .replay pre").text.startswith("cowfence crash replay")
    one(browser, "#v1 > summary").click()
    assert is_open(browser, "#v1")
    assert len(browser.find_elements(By.CSS_SELECTOR, "#v1 .cells i")) == 128
    one(browser, "#v3 > summary").send_keys(Keys.ENTER)
    assert is_open(browser, "#v3")
    one(browser, '[data-all="close"]').click()
    assert not any(is_open(browser, f"#v{number}") for number in (1, 2, 3))
    one(browser, ".flags a").send_keys(Keys.ENTER)
    browser.execute_async_script("setTimeout(arguments[0], 50)")
    assert is_open(browser, "#v1")
    assert complaints(browser) == "[]"


def test_a_real_violation_opens(browser: WebDriver, tmp_path: Path) -> None:
    report = found_without_a_fence()
    assert [violation.clause for violation in report.violations] == ["C3", "C3"]
    load(browser, tmp_path, report)
    assert one(browser, ".verdict").text == "2 violations"
    one(browser, "#v1 > summary").click()
    assert is_open(browser, "#v1")
    assert one(browser, "#v1 .replay pre").text == report.violations[0].replay
    assert len(browser.find_elements(By.CSS_SELECTOR, "#v1 .cells i")) == 128
    assert len(browser.find_elements(By.CSS_SELECTOR, "#v1 .cells i.foreign")) == 1
    one(browser, "#v1 [data-run]").click()
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert one(browser, ".readout").text.startswith(f"{report.violations[0].point} l2.link")
    assert complaints(browser) == "[]"


def test_a_real_sound_run_shows_its_first_cases(browser: WebDriver, tmp_path: Path) -> None:
    cases = [parse_case(f"v3,c512,r16,t64 | {script}") for script in ("write:0+512 flush", "kill", "discard:0+512 flush")]
    load(browser, tmp_path, report_of(explore([("two", cases)], Settings(), jobs=1), "cowfence crash explore --suite two"))
    assert one(browser, ".verdict").text == "No violation"
    assert len(browser.find_elements(By.CSS_SELECTOR, ".plane")) == 3
    assert complaints(browser) == "[]"


def test_the_arrow_keys_walk_through_the_log(browser: WebDriver, tmp_path: Path) -> None:
    report = report_samples.broken()
    load(browser, tmp_path, report)
    plane, readout = one(browser, ".plane"), one(browser, ".readout")
    plane.send_keys(Keys.HOME)
    assert readout.text.startswith("0 open.fence")
    plane.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert readout.text.startswith(f"2 {report.runs[0].entries[2].mark}")
    plane.send_keys(Keys.END)
    assert readout.text.startswith("599 ")


def test_a_violation_leads_to_its_place_in_the_time_line(browser: WebDriver, tmp_path: Path) -> None:
    load(browser, tmp_path, report_samples.broken(5000), "#open=2")
    one(browser, "#v2 [data-run]").click()
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert one(browser, ".readout").text.startswith("2500 ")
    assert int(str(one(browser, ".scroll").get_property("scrollLeft"))) > 1000


def test_zoom_and_the_table_of_the_log(browser: WebDriver, tmp_path: Path) -> None:
    load(browser, tmp_path, report_samples.broken())
    plane = one(browser, ".plane")
    before = plane.size["width"]
    one(browser, '[data-zoom="in"]').click()
    assert plane.size["width"] == pytest.approx(2 * before, abs=2)
    one(browser, '[data-zoom="fit"]').click()
    assert plane.size["width"] == pytest.approx(one(browser, ".scroll").size["width"], abs=2)
    one(browser, ".text > summary").click()
    browser.execute_async_script("setTimeout(arguments[0], 100)")
    assert len(browser.find_elements(By.CSS_SELECTOR, ".text tbody tr")) == 600
    assert complaints(browser) == "[]"
