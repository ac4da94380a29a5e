"""The drawing page in a real browser, with real pointer events."""

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from conftest import CommandLine, chromium, wait_for_server
from playwright.sync_api import Page, expect, sync_playwright

CHROMIUM = chromium()
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
    """`python -m mnist_exp.draw` on a model of one epoch."""
    done = command_line("data.fallback=null", MNIST_ROOT=str(mnist_root.absolute()))
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "mnist_exp.draw", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        link = server.stdout.readline().strip()
        wait_for_server(link, server)
        yield link
        server.terminate()


def draw(page: Page, strokes: list[list[tuple[int, int]]]) -> None:
    box = page.locator("#paper").bounding_box()
    assert box is not None
    for first, *others in strokes:
        page.mouse.move(box["x"] + first[0], box["y"] + first[1])
        page.mouse.down()
        for x, y in others:
            page.mouse.move(box["x"] + x, box["y"] + y, steps=6)
        page.mouse.up()


@pytest.mark.skipif(CHROMIUM is None, reason="the page is looked at in chromium, which is not installed")
def test_ten_drawn_digits_are_read(address: str, tmp_path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 900, "height": 520})
        foreign = []
        page.on("request", lambda request: foreign.append(request.url) if not request.url.startswith(address) else None)
        page.goto(address)
        read = {}
        for digit, strokes in STROKES.items():
            draw(page, strokes)
            expect(page.locator("#answer")).to_have_attribute("aria-busy", "false", timeout=30_000)
            expect(page.locator("#answer")).to_have_text(re.compile(r"Read as \d\."))
            read[digit] = int(page.locator("#answer").inner_text()[-2])
            assert page.locator("#bars tr.best th").inner_text() == str(read[digit])
            page.screenshot(path=tmp_path / f"{digit}.png")
            page.get_by_role("button", name="Clear").click()
            expect(page.locator("#answer")).to_have_text("")
        assert sum(digit == label for digit, label in read.items()) >= 9, read
        assert foreign == [], "no outside address"
        page.locator("#paper").focus()
        for key in (" ", *["ArrowDown"] * 6):
            page.keyboard.press(key)
        expect(page.locator("#answer")).to_have_text(re.compile(r"Read as \d\."))
        page.keyboard.press("Escape")
        expect(page.locator("#answer")).to_have_text("")
        browser.close()


def test_requests_of_others_are_refused(address: str) -> None:
    def status(data: bytes | None, path: str = "/predict", **headers: str) -> int:
        request = urllib.request.Request(address + path, data=data, headers=headers)
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
