"""The report of a comparison: one HTML file with its figures embedded, which needs neither a server nor the network."""

import base64
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import jinja2
import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from mnist_exp.comparison import figures, wording
from mnist_exp.comparison.arms import Arms, Level, Row, differing_params, processor_of
from mnist_exp.comparison.outcomes import Outcomes, disagreements
from mnist_exp.metrics import format_metric
from mnist_exp.tracking.base import RunRecord

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATE = Path(__file__).with_name("report.html")


def render(
    arms: Arms,
    rows: Sequence[Row],
    levels: Sequence[Level],
    outcomes: Outcomes,
    parent: RunRecord,
    commands: Sequence[str],
    images: "Tensor | None",
    page: Callable[[str], str | None],
) -> str:
    """Return the report as HTML with all text escaped.

    Args:
        arms: The runs by arm.
        rows: The comparisons; the figures show the first one's metric.
        levels: The differences in the first metric by the level of other keys.
        outcomes: The outcomes of the runs.
        parent: The parent run of the sweep.
        commands: The shell commands that repeat the sweep and the comparison.
        images: The test images, uint8 (n, channels, side, side), None if they are not available.
        page: Returns the http(s) address of a run's page, None without one.
    """
    # Names are text, not formulas; text stays text; and equal figures give equal bytes.
    with mpl.rc_context({"text.parse_math": False, "svg.fonttype": "none"}):
        drawn = {
            "differences": figures.differences(rows),
            "every_run": figures.every_run(arms, rows[0].metric),
            "examples": figures.learning_curves(arms, outcomes),
            "cost": figures.cost(arms, rows[0].metric),
            "confusion": figures.confusion(arms, outcomes),
        }
        inline = {name: _inline_svg(name, figure, page) if figure else None for name, figure in drawn.items()}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        arms=arms,
        headline=wording.headline(arms, rows),
        notes=wording.notes(arms, rows, levels),
        table=wording.table(rows),
        margin=wording.format_margin(rows[0]),
        levels=[
            {"arm": level.arm, "key": level.key, "level": level.level, "differs": level.differs}
            | {"difference": format_metric(rows[0].metric, level.difference, signed=True, is_difference=True)}
            for level in levels
        ],
        processors=sorted({processor_of(record) for record in arms.records}),
        parent=parent,
        commands=commands,
        figures=inline,
        disagreements=[
            item | {"picture": _png_address(images[item["index"], 0].numpy()) if images is not None else None}
            for item in disagreements(arms, outcomes)
            if images is None or item["index"] < len(images)
        ],
        params=differing_params(arms),
        without_outcome=sum(outcome is None for outcome in outcomes.values()),
    )


def draw_differences(rows: Sequence[Row], file: Path) -> None:
    """Draw the differences and their intervals as a PNG."""
    with mpl.rc_context({"text.parse_math": False}):
        figures.differences(rows).savefig(file, dpi=100, bbox_inches="tight")


def _inline_svg(name: str, figure: Figure, page: Callable[[str], str | None]) -> Markup:
    """Return a figure as an SVG element. Points that stand for runs get a tooltip, and a link where the run has a page."""
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):  # ids that no other figure of the page has
        figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")

    def describe(found: re.Match[str]) -> str:
        title, address = f"<title>{escape(unquote(found['title']))}</title>", page(found["run"])
        if address is None:
            return f"<g>{title}{found['point']}</g>"
        return f'<a href="{escape(address)}" target="_blank" rel="noopener">{title}{found["point"]}</a>'

    svg = text.getvalue()
    point = rf'<a xlink:href="{figures.POINT}(?P<run>[0-9a-f]*)/(?P<title>[^"]*)"[^>]*>(?P<point>.*?)</a>'
    return Markup(re.sub(point, describe, svg[svg.index("<svg") :], flags=re.DOTALL))


def _png_address(pixels: NDArray[Any]) -> str:
    """Return a data URI with an image, uint8 (h, w), as a PNG of dark digits on a light ground."""
    content = io.BytesIO()
    Image.fromarray(255 - pixels).save(content, format="png")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
