"""The drawing page in a real browser, with real pointer events."""

import io
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from conftest import CommandLine, chromium, wait_for_server
from mlflow import MlflowClient
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = chromium()
HOSTILE = "<img src=x onerror=\"document.title='attacked'\">"  # the name of a run: anybody who writes to the store sets it
ANSWER = re.compile(r"\d.*%")
pytestmark = pytest.mark.slow

# The strokes of each digit on a paper of 280 x 280.
STROKES: dict[int, list[list[tuple[int, int]]]] = {
    0: [[(140, 50), (90, 90), (85, 150), (105, 215), (150, 230), (190, 190), (195, 120), (175, 70), (140, 50)]],
    1: [[(140, 50), (140, 230)]],
    2: [[(90, 95), (110, 60), (155, 50), (185, 80), (175, 120), (130, 175), (85, 225), (195, 225)]],
    3: [[(95, 60), (160, 50), (185, 85), (140, 130), (190, 165), (180, 215), (130, 232), (85, 215)]],
    4: [[(110, 50), (85, 150), (195, 150)], [(175, 50), (165, 235)]],
    5: [[(190, 50), (105, 50), (98, 125), (150, 115), (190, 150), (180, 205), (135, 232), (85, 215)]],
    6: [[(165, 45), (110, 110), (90, 175), (115, 225), (165, 222), (185, 180), (150, 145), (100, 165)]],
    7: [[(85, 60), (195, 60), (150, 140), (120, 235)]],
    8: [
        [
            (140, 135),
            (95, 95),
            (120, 52),
            (165, 52),
            (185, 92),
            (140, 135),
            (92, 180),
            (110, 228),
            (170, 228),
            (190, 182),
            (140, 135),
        ]
    ],
    9: [[(185, 95), (140, 125), (100, 100), (115, 60), (165, 50), (186, 92), (175, 160), (155, 232)]],
}


@pytest.fixture
def address(command_line: CommandLine, store: str, mnist_root) -> Iterator[str]:
    """`python -m mnist_exp.draw` on a model of one epoch, whose run has a hostile name."""
    done = command_line("data.fallback=null", MNIST_ROOT=str(mnist_root.absolute()))
    assert done.returncode == 0, done.stderr
    client = MlflowClient(store)
    [run] = client.search_runs([item.experiment_id for item in client.search_experiments()])
    client.set_tag(run.info.run_id, "mlflow.runName", HOSTILE)
    with serving() as link:
        yield link


@pytest.fixture
def untrained(stored_run: str) -> Iterator[str]:
    """The same on a network that has not learned anything, which takes no minute to make."""
    with serving() as link:
        yield link


@contextmanager
def serving() -> Iterator[str]:
    command = [sys.executable, "-m", "mnist_exp.draw", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        link = server.stdout.readline().strip()
        wait_for_server(link, server)
        yield link
        server.terminate()


def draw(page: Page, strokes: list[list[tuple[int, int]]]) -> str:
    """Draw with the mouse, and return the name in the answer."""
    box = page.locator("#paper").bounding_box()
    assert box is not None
    scale = box["width"] / 280
    for first, *others in strokes:
        page.mouse.move(box["x"] + scale * first[0], box["y"] + scale * first[1])
        page.mouse.down()
        for x, y in others:
            page.mouse.move(box["x"] + scale * x, box["y"] + scale * y, steps=6)
        page.mouse.up()
    return answer(page)


def answer(page: Page) -> str:
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "false", timeout=30_000)
    expect(page.locator("#answer")).to_have_text(ANSWER)
    return page.locator("#name").inner_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("the page is looked at in chromium, which is not installed")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def test_ten_drawn_digits_are_read(address: str, browser: Browser, tmp_path) -> None:
    page = browser.new_page(viewport={"width": 900, "height": 520})
    foreign = []
    page.on("request", lambda request: foreign.append(request.url) if not request.url.startswith(address) else None)
    page.goto(address)
    assert HOSTILE in page.locator("header").inner_text()
    assert page.title() != "attacked"
    read = {}
    for digit, strokes in STROKES.items():
        read[digit] = int(draw(page, strokes))
        assert page.locator("#bars tr.best th").inner_text() == str(read[digit])
        page.screenshot(path=tmp_path / f"{digit}.png")
        page.get_by_role("button", name="Clear").click()
        expect(page.locator("#answer")).to_have_text("")
    assert sum(digit == label for digit, label in read.items()) >= 9, read
    assert foreign == [], "no outside address"
    # By keyboard.
    page.locator("#paper").focus()
    for key in (" ", *["ArrowDown"] * 6):
        page.keyboard.press(key)
    assert answer(page)
    page.keyboard.press("Escape")
    expect(page.locator("#answer")).to_have_text("")

    # Undo.
    def seen() -> str:
        return str(page.evaluate("document.getElementById('seen').toDataURL()"))

    draw(page, STROKES[1])
    one = seen()
    for undo in (page.get_by_role("button", name="Undo").click, lambda: page.keyboard.press("Control+z")):
        draw(page, [[(40, 40), (240, 40)]])
        assert seen() != one
        undo()
        answer(page)
        assert seen() == one
    page.keyboard.press("Control+z")
    expect(page.locator("#answer")).to_have_text("")
    page.close()


def test_phones_and_dark_mode(untrained: str, browser: Browser) -> None:
    for width, height in ((390, 844), (844, 390)):
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="dark")
        page.goto(untrained)
        draw(page, STROKES[1])
        for part in ("#paper", "#answer"):
            box = page.locator(part).bounding_box()
            assert box is not None
            assert min(box["x"], box["y"]) >= 0
            assert box["x"] + box["width"] <= width
            assert box["y"] + box["height"] <= height
        assert page.evaluate("document.documentElement.scrollWidth") == width
        corner = Image.open(io.BytesIO(page.screenshot())).convert("L").getpixel((2, 2))
        assert isinstance(corner, int)
        assert corner < 50
        page.close()


def test_requests_of_others_are_refused(untrained: str) -> None:
    def status(data: bytes | None, path: str = "/predict", **headers: str) -> int:
        request = urllib.request.Request(untrained + path, data=data, headers=headers)
        try:
            return urllib.request.urlopen(request, timeout=30).status
        except urllib.error.HTTPError as error:
            json.load(error)
            return error.code

    assert status(None, "/") == 200
    assert status(None, "/", Host="evil.example") == 403
    assert status(b"x", Origin="http://evil.example") == 403
    assert status(b"x") == 422
    assert status(b"x" * 400_000) == 413
    assert status(None, "/") == 200, "it goes on"
