"""report.html in headless Chromium: no console errors, filters, keyboard, 3D view. Skipped without a browser."""

import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import report_pages
from PIL import Image
from report_pages import SIDE, made_up_class, made_up_page, made_up_sample, made_up_samples

from utils.reporting.visualization import PREDICTED, TRUTH

pytest.importorskip("selenium", reason="selenium is not installed: pip install -r requirements-dev.txt")

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND",
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",  # a mouse
)  # fmt: skip
EVIL = "<img src=x onerror=alert(1)>"

pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="there is no browser: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.set_capability("unhandledPromptBehavior", "ignore")  # an alert fails the test
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", ",".join(filter(None, (os.environ.get("NO_PROXY"), "localhost", "127.0.0.1"))))
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        yield driver
        driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    odd = [made_up_sample(f"test/{EVIL}/{i:03d}", 0.2 + 0.2 * i) for i in range(3)]
    odd = [sample._replace(mask=0 * sample.mask) for sample in odd]  # a defect without marked pixels
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(made_up_page(made_up_class("gasket", made_up_samples(12)), made_up_class(EVIL, odd, limit=2)))
    return path


@pytest.fixture(name="report")
def report_fixture(browser: webdriver.Chrome, page: Path) -> Iterator[webdriver.Chrome]:
    """Freshly loaded page in a desktop window; fails at the end on console errors."""
    browser.set_window_size(1280, 900)
    browser.get(page.as_uri())
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def cards(report: webdriver.Chrome) -> list:
    return [card for card in report.find_elements(By.CSS_SELECTOR, "#cards > li > button") if card.is_displayed()]


def title(report: webdriver.Chrome) -> str:
    return report.find_element(By.ID, "viewer-title").text


def is_open(report: webdriver.Chrome) -> bool:
    return report.find_element(By.ID, "viewer").is_displayed()


def press(report: webdriver.Chrome, *keys: str) -> None:
    for key in keys:
        report.switch_to.active_element.send_keys(key)


def drawn(report: webdriver.Chrome) -> np.ndarray:
    """Pixels (H, W, 3) of the 3D view after it is drawn."""
    WebDriverWait(report, 60).until(
        lambda _: (
            "points." in report.find_element(By.ID, "space-note").text
            and report.find_elements(By.CSS_SELECTOR, "#plot canvas")
        )
    )
    plot = report.find_element(By.ID, "plot")
    report.execute_script("arguments[0].scrollIntoView()", plot)
    return np.asarray(Image.open(io.BytesIO(plot.screenshot_as_png)).convert("RGB")).astype(int)


def test_every_sample_has_a_card_with_images(report: webdriver.Chrome) -> None:
    assert len(cards(report)) == 14
    assert report.find_element(By.ID, "count").text == "14 of 14 samples"
    for card in cards(report):
        report.execute_script("arguments[0].scrollIntoView()", card)
        for image in card.find_elements(By.TAG_NAME, "img"):
            WebDriverWait(report, 10).until(lambda _, image=image: int(image.get_property("naturalWidth")) > 0)
    assert EVIL in report.find_element(By.ID, "cards").text
    assert not report.find_elements(By.CSS_SELECTOR, "img[src=x]")


@pytest.mark.slow
def test_filters_show_matching_samples(report: webdriver.Chrome) -> None:
    def choose(name: str, value: str) -> list[str]:
        Select(report.find_element(By.CSS_SELECTOR, f"[data-filter={name}]")).select_by_value(value)
        return [card.text for card in cards(report)]

    everything = [card.text for card in cards(report)]
    misses = choose("outcome", "miss")
    assert misses == [text for text in everything if text.startswith("miss")]
    assert 0 < len(misses) < len(everything)
    assert choose("defect", "good") == []
    assert report.find_element(By.ID, "count").text == "No sample fits these filters."
    choose("outcome", "")
    assert all("good/" in text for text in choose("class", "gasket"))
    assert choose("class", EVIL) == []
    assert len(choose("defect", EVIL)) == 2


@pytest.mark.slow
def test_keyboard_navigation_of_cards_and_viewer(report: webdriver.Chrome) -> None:
    texts = [card.text for card in cards(report)]
    report.execute_script("document.querySelector('#cards button').focus()")
    press(report, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.ENTER)
    assert is_open(report)
    second = title(report)
    assert second.split("test/")[1] in texts[1]
    assert report.find_element(By.ID, "position").text == "2 / 14"
    press(report, Keys.ARROW_RIGHT)
    third = title(report)
    assert third != second
    press(report, Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert report.find_element(By.ID, "position").text == "1 / 14"
    press(report, Keys.ESCAPE)
    assert not is_open(report)
    WebDriverWait(report, 10).until(lambda _: report.switch_to.active_element.text == texts[0])
    press(report, Keys.END)
    assert report.switch_to.active_element.text == texts[-1]


@pytest.mark.slow
def test_viewer_steps_through_filtered_samples_only(report: webdriver.Chrome) -> None:
    Select(report.find_element(By.CSS_SELECTOR, "[data-filter=defect]")).select_by_value("good")
    count = len(cards(report))
    cards(report)[0].click()
    for _ in range(count + 2):
        assert "/good/" in title(report)
        press(report, Keys.ARROW_RIGHT)
    assert report.find_element(By.ID, "position").text == f"{count} / {count}"


@pytest.mark.slow
def test_a_dot_opens_its_sample_whatever_the_filters(report: webdriver.Chrome) -> None:
    Select(report.find_element(By.CSS_SELECTOR, "[data-filter=defect]")).select_by_value("good")
    report.find_element(By.CSS_SELECTOR, ".dot[data-path='test/hole/001']").click()
    assert title(report) == "gasket / test/hole/001"
    assert report.find_element(By.ID, "count").text == "14 of 14 samples"


@pytest.mark.slow
def test_viewer_shows_every_panel(report: webdriver.Chrome) -> None:
    next(card for card in cards(report) if card.text.startswith("miss")).click()
    panels = [each.text for each in report.find_elements(By.CSS_SELECTOR, "#panels figcaption")]
    assert panels == ["image", "outlines", "fused map", "xyz map, own scale", "rgb map, own scale"]
    facts = report.find_element(By.ID, "viewer-facts").text
    assert re.search(r"miss · severity 0\.\d\d · ground truth: (hole|stain & dent) · score 0", facts)
    assert report.find_element(By.CSS_SELECTOR, "dialog .legend").is_displayed()


@pytest.mark.slow
def test_defective_sample_without_marked_pixels_is_not_called_good(report: webdriver.Chrome) -> None:
    def truth(text: str) -> str:
        next(card for card in cards(report) if text in card.text).click()
        facts = report.find_element(By.ID, "viewer-facts").text
        press(report, Keys.ESCAPE)
        return facts.split("ground truth: ")[1].split(" · ")[0]

    assert truth(EVIL) == f"{EVIL}, not marked"
    assert truth("good/") == "good"


@pytest.mark.slow
def test_3d_view_in_colors_of_image_and_score(report: webdriver.Chrome) -> None:
    assert report.execute_script("return typeof Plotly") == "undefined"  # Plotly is loaded on demand
    cards(report)[0].click()
    report.find_element(By.ID, "draw").click()
    by_image = drawn(report)
    assert by_image.reshape(-1, 3).std(axis=0).min() > 5
    brown = (by_image[..., 0] > by_image[..., 2] + 40).mean()
    assert brown > 0.03
    press(report, "s")
    WebDriverWait(report, 60).until(lambda _: report.find_elements(By.CSS_SELECTOR, "#plot .cbaxis"))
    by_score = drawn(report)
    assert [each.text for each in report.find_elements(By.CSS_SELECTOR, "#plot .cbaxis text")] == [
        "0",
        "threshold",
        "2",
    ]
    assert report.find_element(By.CSS_SELECTOR, "#plot .cbtitle").text == "anomaly map"
    assert by_score.shape == by_image.shape
    assert (np.abs(by_score - by_image).max(axis=2) > 30).mean() > 0.03
    press(report, Keys.ARROW_RIGHT)
    drawn(report)
    assert len(report.find_elements(By.CSS_SELECTOR, "#plot canvas")) == 1
    press(report, "3")
    assert not report.find_element(By.ID, "plot").is_displayed()
    assert report.find_elements(By.CSS_SELECTOR, "#plot canvas") == []


@pytest.mark.slow
def test_3d_outlines_do_not_cross_a_jump_in_depth(
    browser: webdriver.Chrome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defective = made_up_sample("test/hole/000", 1.0)
    step = int(np.flatnonzero(defective.mask.any(dim=1)).mean())  # row that divides the defect
    row, column = np.mgrid[:SIDE, :SIDE]
    cloud = np.stack([0.001 * column - 0.03, 0.001 * row - 0.03, np.where(row < step, 0.5, 0.54)], axis=-1)
    monkeypatch.setattr(report_pages, "made_up_cloud", lambda _: cloud.astype(np.float32))
    (tmp_path / "report.html").write_text(made_up_page(made_up_class("gasket", [defective])))
    browser.get((tmp_path / "report.html").as_uri())
    cards(browser)[0].click()
    browser.find_element(By.ID, "draw").click()
    drawn(browser)
    traces = browser.execute_script(
        "return document.getElementById('plot').data.filter((trace) => trace.type === 'scatter3d')"
    )
    assert {"predicted", "ground truth"} == {trace["name"] for trace in traces}
    for trace in traces:
        heights = np.array([z for z in trace["z"] if z is not None]).reshape(-1, 2)
        assert np.ptp(heights) > 39 and np.ptp(heights, axis=1).max() < 1


@pytest.mark.slow
def test_3d_view_has_outlines_on_the_surface_and_axes_in_millimeters(report: webdriver.Chrome) -> None:
    next(card for card in cards(report) if card.text.startswith("hit")).click()
    report.find_element(By.ID, "draw").click()
    drawn(report)
    lines = report.execute_script(
        "return document.getElementById('plot').data.filter((trace) => trace.type === 'scatter3d')"
        ".map((trace) => [trace.name, trace.line.color, trace.x.filter((x) => x !== null)])"
    )
    assert [(name, color) for name, color, _ in lines] == [("predicted", PREDICTED), ("ground truth", TRUTH)]
    assert all(0.5 < np.ptp(xs) < 60 and np.abs(xs).max() < 42 for _, _, xs in lines)
    scene = report.execute_script("return document.getElementById('plot').layout.scene")
    axes = [scene[f"{axis}axis"] for axis in "xyz"]
    assert [axis["title"]["text"] for axis in axes] == ["x, mm", "y, mm", "z, mm"]
    # The dome is 84 mm wide and 480.5 to 493 mm away; y and z are drawn upwards and toward the viewer.
    assert [axis["ticktext"] for axis in axes] == [
        ["-40", "-20", "0", "20", "40"], ["40", "20", "0", "-20", "-40"], ["490"]
    ]  # fmt: skip
    assert axes[1]["tickvals"] == [-40, -20, 0, 20, 40]


def camera(report: webdriver.Chrome) -> dict[str, np.ndarray]:
    found = report.execute_script("return document.getElementById('plot').layout.scene.camera")
    return {name: np.array([found[name][axis] for axis in "xyz"]) for name in ("eye", "up")}


@pytest.mark.slow
def test_keyboard_rotates_the_3d_view_and_the_next_sample_keeps_it(report: webdriver.Chrome) -> None:
    def press_shifted(key: str) -> None:
        ActionChains(report).key_down(Keys.SHIFT).send_keys(key).key_up(Keys.SHIFT).perform()

    cards(report)[0].click()
    press(report, "3")
    first = drawn(report)
    plot = report.find_element(By.ID, "plot")
    assert (plot.get_attribute("tabindex"), plot.get_attribute("role")) == ("0", "img")
    assert plot.get_attribute("aria-label")
    start, position = camera(report), report.find_element(By.ID, "position").text
    press_shifted(Keys.ARROW_RIGHT)
    right = camera(report)
    (x, y, z), (old_x, old_y, old_z) = right["eye"], start["eye"]
    assert y == pytest.approx(old_y)
    assert np.arctan2(x, z) == pytest.approx(np.arctan2(old_x, old_z) + np.pi / 18)
    assert report.find_element(By.ID, "position").text == position
    press_shifted(Keys.ARROW_LEFT)
    assert camera(report)["eye"] == pytest.approx(start["eye"])
    for _ in range(3):
        press_shifted(Keys.ARROW_DOWN)
    down = camera(report)
    assert down["eye"][1] < start["eye"][1]
    assert np.linalg.norm(down["eye"]) == pytest.approx(np.linalg.norm(start["eye"]))
    press(report, "+")
    closer = camera(report)
    assert closer["eye"] == pytest.approx(0.8 * down["eye"])
    assert (np.abs(drawn(report) - first).max(axis=2) > 30).mean() > 0.03
    press(report, Keys.ARROW_RIGHT)
    drawn(report)
    assert camera(report)["eye"] == pytest.approx(closer["eye"])


@pytest.mark.slow
def test_browser_without_webgl_shows_a_note(report: webdriver.Chrome) -> None:
    report.execute_script("HTMLCanvasElement.prototype.getContext = () => null")
    cards(report)[0].click()
    press(report, "3")
    note = report.find_element(By.ID, "space-note")
    WebDriverWait(report, 30).until(lambda _: "no WebGL" in note.text)
    assert "points" not in note.text


@pytest.mark.slow
def test_steps_are_announced_to_screen_readers(report: webdriver.Chrome) -> None:
    cards(report)[0].click()
    facts = report.find_element(By.ID, "viewer-facts")
    assert facts.get_attribute("aria-live") == "polite"
    first = facts.get_property("textContent")
    assert title(report) in first
    press(report, Keys.ARROW_RIGHT)
    assert title(report) in facts.get_property("textContent") != first


@pytest.mark.slow
def test_only_opening_the_3d_view_scrolls_to_it(report: webdriver.Chrome) -> None:
    report.execute_script(
        "window.scrolls = 0; document.getElementById('plot').scrollIntoView = () => { window.scrolls += 1; }"
    )
    cards(report)[0].click()
    press(report, "3")
    WebDriverWait(report, 60).until(lambda _: report.execute_script("return window.scrolls") == 1)
    press(report, "s", Keys.ARROW_RIGHT)
    WebDriverWait(report, 60).until(lambda _: report.find_elements(By.CSS_SELECTOR, "#plot .cbaxis"))
    assert report.execute_script("return window.scrolls") == 1


@pytest.mark.slow
def test_page_fits_the_width_of_a_phone(report: webdriver.Chrome) -> None:
    report.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True},
    )
    try:
        assert report.execute_script("return document.documentElement.scrollWidth") <= 390
        cards(report)[0].click()
        assert report.execute_script("return document.getElementById('viewer').scrollWidth") <= 390
    finally:
        report.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
def test_keys_are_explained_only_where_there_are_keys(report: webdriver.Chrome) -> None:
    texts = report.find_elements(By.CLASS_NAME, "keys")
    cards(report)[0].click()
    assert [each.is_displayed() for each in texts] == [True, True]
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    report.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    report.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        assert [each.is_displayed() for each in texts] == [False, False]
        assert "Shift" not in report.find_element(By.ID, "viewer").text
    finally:
        report.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
        report.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
def test_dark_mode_is_dark(report: webdriver.Chrome) -> None:
    def brightness(scheme: str) -> float:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        report.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        return float(np.asarray(Image.open(io.BytesIO(report.get_screenshot_as_png())).convert("L")).mean())

    assert brightness("light") > 200
    assert brightness("dark") < 80
    report.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.slow
def test_tables_and_charts_need_no_script(report: webdriver.Chrome) -> None:
    report.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        report.refresh()
        assert len([dot for dot in report.find_elements(By.CLASS_NAME, "dot") if dot.is_displayed()]) == 15
        figures = report.find_element(By.CSS_SELECTOR, "table.figures")
        assert not figures.is_displayed()
        for summary in report.find_elements(By.TAG_NAME, "summary"):
            summary.click()
        assert figures.is_displayed()
        assert all(svg.is_displayed() for svg in report.find_elements(By.TAG_NAME, "svg"))
        assert "need JavaScript" in report.find_element(By.TAG_NAME, "noscript").text
    finally:
        report.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
