"""The page in a real browser: what a person does, and sees."""

import io
import json
import os
import re
import urllib.request

import numpy as np
import pytest
from PIL import Image

from keras_uvit.data import shapes

MODELS = ("uvit_tiny_digits", "uvit_tiny_shapes", "uvit_tiny_digits_fast")
DIGITS, SHAPES, FAST = range(3)
SECONDS = 200  # the first drawing is compiled, beside what else the machine does
CIRCLE = "a small red circle left of a large blue square"
TRIANGLE = "a large yellow triangle above a small green circle"


class Page:
    """A tab of the browser at the page, and a model of it."""

    def __init__(self, browser, server, index):
        from selenium.webdriver.support.ui import WebDriverWait

        browser.switch_to.new_window("tab")
        self.browser, self.handle, self.index = browser, browser.current_window_handle, index
        self.wait = WebDriverWait(browser, SECONDS).until
        browser.get(server.url)
        self.wait(lambda _: self.all("button[role=tab]"))
        (tab,) = [tab for tab in self.all("button[role=tab]") if tab.text == MODELS[index]]
        tab.click()
        self.wait(lambda _: self.shown("draw"))

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def shown(self, name, inside=""):
        found = self.all(f"#{name}-{self.index} {inside}".strip())
        return next((element for element in found if element.is_displayed()), None)

    def type(self, name, text):
        from selenium.webdriver.common.keys import Keys

        field = self.shown(name, "input, " + f"#{name}-{self.index} textarea")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.DELETE, text)

    def source(self):
        image = self.shown("grid", "img")
        return image and image.get_attribute("src")

    def draw(self):
        """Presses the button; `picture` waits for what comes."""
        self.browser.switch_to.window(self.handle)
        self.before = self.source()
        self.shown("draw").click()

    def picture(self, zoom):
        """The picture that has come in place of the one before, `(H, W, C)` uint8."""
        self.browser.switch_to.window(self.handle)
        self.wait(lambda _: self.source() not in (None, self.before))
        with urllib.request.urlopen(self.source()) as answer:
            picture = np.asarray(Image.open(io.BytesIO(answer.read())))
        return picture[::zoom, ::zoom]

    def message(self):
        """What the box that comes over the page says; closes it."""
        text = self.wait(lambda _: "".join(box.text for box in self.all(".toast-body.error")))
        (box,) = self.all(".toast-body.error")
        box.find_element("css selector", ".toast-close").click()
        self.wait(lambda _: not self.all(".toast-body"))
        return text

    def upload(self, name, picture, folder):
        path = folder / f"{name}.png"
        Image.fromarray(picture).save(path)
        self.shown(name)
        (file,) = self.all(f"#{name}-{self.index} input[type=file]")
        file.send_keys(str(path))
        self.wait(lambda _: self.shown(name, "img"))


@pytest.fixture
def opened(browser, server):
    """Opens the page, and closes it after the test."""
    first = browser.current_window_handle
    yield lambda index: Page(browser, server, index)
    for handle in set(browser.window_handles) - {first}:
        browser.switch_to.window(handle)
        browser.close()
    browser.switch_to.window(first)


def test_a_typed_prompt_is_drawn(opened, browser):
    page = opened(SHAPES)
    page.type("number", "1")
    pictures = []
    for prompt in (CIRCLE, TRIANGLE):
        page.type("prompts", prompt)
        page.draw()
        pictures.append(page.picture(zoom=4))
        assert str(shapes.read_back(pictures[-1])) == prompt
        assert page.shown("said").text.startswith("1 image in ")
    assert (pictures[0] != pictures[1]).any()
    if "SCREENSHOT" in os.environ:  # for docs/app.md
        page.type("number", "4")
        page.draw()
        page.picture(zoom=4)
        browser.save_screenshot(os.environ["SCREENSHOT"])


def test_each_model_has_the_fields_of_what_it_can(opened):
    text = {"prompts", "negative_prompts"}
    shared = {"number", "seed", "sampler", "num_steps", "guidance_scale"}
    own = {DIGITS: {"classes"}, SHAPES: text, FAST: {"classes"}}
    for index, names in own.items():
        page = opened(index)
        for name in {*text, "classes", *shared}:
            assert bool(page.shown(name)) == (name in names | shared), (index, name)
    assert "from 1 to 4" in page.shown("guidance_scale").text  # what the flow map has learned


def test_wrong_input_is_answered_in_the_words_of_the_library(opened, server):
    page = opened(SHAPES)
    for name, wrong, right, words in (
        ("num_steps", "1", "25", "num_steps of sampler 'dpm_solver_pp_2m' must be an int >= 2"),
        ("number", "65", "1", "number is at most 64 on this page. Received: 65."),
        ("prompts", "", CIRCLE, "Type a prompt"),
    ):
        page.type(name, wrong)
        page.draw()
        assert words in page.message()
        page.type(name, right)
    page.type("guidance_scale", "1")
    page.type("negative_prompts", "a large red square")
    page.draw()
    assert "pass guidance_scale, such as 2.0" in page.message()
    assert page.source() is None  # nothing was drawn
    assert "Traceback" not in page.browser.page_source + server.log.read_text()


def test_two_tabs_are_served_in_turn(opened):
    prompts = {CIRCLE: opened(SHAPES), TRIANGLE: opened(SHAPES)}
    for prompt, page in prompts.items():
        page.browser.switch_to.window(page.handle)
        page.type("number", "1")
        page.type("prompts", prompt)
    for page in prompts.values():
        page.draw()
    for prompt, page in prompts.items():
        assert str(shapes.read_back(page.picture(zoom=4))) == prompt


def test_progress_is_shown(opened):
    page = opened(DIGITS)
    page.type("num_steps", "200")
    page.draw()
    page.wait(lambda _: re.search(r"Drawing - \d+\.\d%", page.shown("grid").text))
    assert page.picture(zoom=16).shape == (25, 33)  # 3 x 4 digits, with a gap between them


def test_a_picture_is_completed_and_downloaded(opened, browser, tmp_path):
    """The left half of the picture stays, pixel for pixel; the file is what the page shows."""
    page = opened(FAST)
    page.type("number", "1")
    next(part for part in page.all("button.label-wrap") if part.is_displayed()).click()
    page.wait(lambda _: page.shown("image"))
    noise = np.random.default_rng(0).integers(0, 256, (8, 8), "uint8")
    mask = np.repeat([[0, 255]], 8, axis=0).astype("uint8").repeat(4, axis=1)
    page.upload("image", noise, tmp_path)
    page.upload("mask", mask, tmp_path)
    page.draw()
    picture = page.picture(zoom=16)
    np.testing.assert_array_equal(picture[:, :4], noise[:, :4])
    assert (picture[:, 4:] != noise[:, 4:]).mean() > 0.5  # noise is no half of a digit
    page.shown("grid", "a[download]").click()
    page.wait(lambda _: list(browser.folder.glob("*.png")))
    (file,) = browser.folder.glob("*.png")
    np.testing.assert_array_equal(np.asarray(Image.open(file))[::16, ::16], picture)


def test_nothing_but_this_machine_is_asked(opened, browser, server):
    """Neither by the page, such as for fonts, nor by the server, such as for statistics of use."""
    opened(DIGITS)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    strange = [url for url in urls if not url.startswith((server.url, "data:", "blob:"))]
    assert len(urls) > 10
    assert strange == []
    assert not server.tried.exists()
