"""Make the pictures in docs/images/ from the runs of one store and the study of squeeze-excitation.

    python scripts/pictures.py [--store FOLDER]

The script records one run and two sweeps in FOLDER, unless it has done so before. It compares the second sweep, promotes the run,
and takes pictures of the terminal, the report, the MLflow UI and the drawing page. It needs Chromium, as Debian's `chromium`.
"""

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console
from rich.text import Text

from mnist_exp.paths import NAME

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
RUN = ["run"]
QUICK = ["run", "-m", "experiment=quick"]  # few runs: the UI shows each of them
SWEEP = ["run", "-m", "experiment=se_vs_plain", "seed=range(100,120)"]
COMPARE = ["compare", "latest", "--baseline", "se_cnn"]
STUDY = ["compare", "--results", "docs/studies/se_vs_plain.csv", "--images"]
TWO = [(90, 95), (110, 60), (155, 50), (185, 80), (175, 120), (130, 175), (85, 225), (195, 225)]  # on a paper of 280 x 280


def line(words: list[str]) -> list[str]:
    """Return the command line of a command of the package."""
    return [sys.executable, "-m", f"{NAME}.{words[0]}", *words[1:]]


def output(words: list[str], store: Path, width: int) -> str:
    """Return the output of a command on a terminal of `width` columns, with its colors; it is kept for the next call."""
    kept = store / (re.sub(r"\W+", "-", " ".join(words[:3])) + ".txt")
    if not kept.exists():
        environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(width)}
        kept.write_text(subprocess.run(line(words), env=environment, check=True, capture_output=True, text=True).stdout)
    return kept.read_text()


def draw_terminal(words: list[str], text: str, width: int, name: str) -> None:
    """Draw a terminal with a command and the end of its output: progress bars as they were last, and no paths of this machine."""
    shown = text.rpartition("\x1b[2K")[2].partition("\nReport: ")[0].strip("\n")
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(Text.from_ansi(shown))
    svg = console.export_svg(title=" ".join(["python", "-m", f"{NAME}.{words[0]}", *words[1:]]), unique_id=name)
    without_font = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL).replace("Fira Code, monospace", "monospace")
    (IMAGES / f"{name}.svg").write_text(without_font)  # the font would be loaded from elsewhere


@contextmanager
def serving(words: list[str], ready: str) -> Iterator[list[str]]:
    """Start a command that serves pages; yield its output up to a line with `ready`, and end it."""
    server = subprocess.Popen(line(words), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    try:
        printed = []
        for text in server.stdout:
            printed.append(text.strip())
            if ready in text:
                break
        yield printed
    finally:
        server.terminate()
        server.wait()


def take(browser: Browser, address: str, name: str, height: int, width: int = 1400) -> None:
    """Take a picture of a page."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(address)
    page.wait_for_timeout(8000)  # for the charts and their histories
    page.screenshot(path=IMAGES / f"{name}.png", clip={"x": 0, "y": 0, "width": width, "height": height})
    page.close()


def draw_digit(page: Page) -> None:
    """Draw a 2 on the drawing page."""
    paper = page.locator("#paper").bounding_box()
    assert paper is not None
    points = [(paper["x"] + x * paper["width"] / 280, paper["y"] + y * paper["height"] / 280) for x, y in TWO]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=6)
    page.mouse.up()
    page.wait_for_timeout(2000)


def main() -> None:
    """Parse the command line, train, and make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=ROOT / "outputs" / "pictures", metavar="FOLDER")
    store = parser.parse_args().store.absolute()
    store.mkdir(parents=True, exist_ok=True)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{store}/mlflow.db"
    draw_terminal(RUN, output(RUN, store, 90), 90, "run")
    run, quick = (re.findall(rf"{NAME}\.ui (\w+)", output(words, store, 90))[-1] for words in (RUN, QUICK))
    output(SWEEP, store, 120)
    output(COMPARE, store, 104)
    draw_terminal(STUDY, output(STUDY, store, 120), 120, "compare")
    output(["runs", "promote", "--run", run, "--name", "mnist"], store, 100)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        take(browser, (ROOT / "docs" / "studies" / "se_vs_plain.html").as_uri(), "report", 900, 860)
        with serving(["ui"], "Ctrl-C") as printed:
            links = dict(text.rpartition(": ")[::2] for text in printed)
            take(browser, links["Leaderboard: mnist by val/accuracy"], "leaderboard", 620)
            take(browser, next(iter(links.values())), "sweep", 620)  # the answer
        with serving(["ui", run], "Ctrl-C") as printed:
            take(browser, printed[0].rpartition(": ")[2], "run", 560)
        with serving(["ui", quick, "--view", "curves"], "Ctrl-C") as printed:
            take(browser, printed[0].rpartition(": ")[2], "charts", 780)
        with serving(["draw", "--model", run, "--port", "0"], "http") as printed:
            page = browser.new_page(viewport={"width": 900, "height": 700})
            page.goto(printed[-1])
            draw_digit(page)
            page.screenshot(path=IMAGES / "draw.png")
        browser.close()


if __name__ == "__main__":
    main()
