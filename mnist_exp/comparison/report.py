"""The report of a comparison: one HTML file with its figures embedded, which needs neither a server nor the network."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jinja2
import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from mnist_exp.comparison import figures, wording
from mnist_exp.comparison.history import History
from mnist_exp.comparison.pairs import Comparison
from mnist_exp.tracking.base import RunRecord
from mnist_exp.tracking.frame import SEED

TEMPLATE = Path(__file__).with_name("report.html")
# Names are text, not formulas; text stays text; and the text of all figures has one size.
STYLE: Any = {"text.parse_math": False, "svg.fonttype": "none", "font.size": 10, "legend.frameon": False}


def write(
    file: Path,
    comparison: Comparison,
    *,
    records: Mapping[str, RunRecord],
    histories: Mapping[str, History | None],
    parent: RunRecord | None,
    commands: Sequence[str],
    class_names: Sequence[str],
    page: Callable[[str], str | None],
) -> Path:
    """Write the report as HTML with all text escaped, and its first figure beside it as a PNG, whose path is returned.

    Args:
        file: The file to write, NAME.html.
        comparison: The comparison.
        records: The runs of the comparison, by id; those of a table have none.
        histories: Those of the runs, by id; None for a run without a readable one.
        parent: The parent of the sweep; None for a table.
        commands: The commands that repeat sweep and comparison.
        class_names: The name of each class, none if unknown.
        page: Returns the address of a run's page, None without one.
    """
    ids = dict(list(comparison.runs.groupby(comparison.factor, sort=False)["run"]))
    by_arm = {arm: [history for run in own if (history := histories.get(run))] for arm, own in ids.items()}
    with mpl.rc_context(STYLE):
        first = figures.differences_or_curve(comparison)
        found = {
            "differences": first,
            "every_run": figures.every_run(comparison),
            "learning_curves": figures.learning_curves(comparison, by_arm, parent.objective if parent else ""),
            "mistakes": figures.mistakes(comparison, by_arm, class_names),
        }
        inline = {name: _inline_svg(name, figure, page) if figure else None for name, figure in found.items()}
        first.patch.set(edgecolor="0.8", linewidth=2)  # a border on a dark page
        picture = file.with_suffix(".png")
        first.savefig(picture, dpi=100)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    content = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        comparison=comparison,
        title=wording.title(comparison),
        subtitle=wording.subtitle(comparison),
        notes=[Markup(re.sub("`(.+?)`", r"<code>\1</code>", str(escape(note)))) for note in wording.notes(comparison)],
        margin=wording.format_margin(comparison.rows[0]),
        differences=wording.differences_table(comparison),
        means=wording.means_table(comparison),
        processors=sorted(filter(None, comparison.runs["processor"].unique())),
        torch=", ".join(filter(None, comparison.runs["torch"].unique())),
        code=", ".join(filter(None, comparison.runs["code"].unique())),
        parent=parent,
        commands=commands,
        figures=inline,
        params=_differing_params({arm: [records[run].params for run in own if run in records] for arm, own in ids.items()}),
        without_history=sum(history is None for history in histories.values()),
    )
    file.write_text(content, encoding="utf-8")
    return picture


def _differing_params(params: Mapping[str, Sequence[Mapping[str, str]]]) -> dict[str, dict[str, str]]:
    """Return the parameters that differ between arms, as their values by arm; params: those of each run, by arm."""
    table = {}
    for key in sorted({key for own in params.values() for run in own for key in run} - {SEED}):
        by_arm = {arm: ", ".join(sorted({run.get(key, "-") for run in own})) for arm, own in params.items()}
        if len(set(by_arm.values())) > 1:
            table[key] = by_arm
    return table


def _inline_svg(name: str, figure: Figure, page: Callable[[str], str | None]) -> Markup:
    """Return a figure as an SVG element in the colors of the page.

    Points that stand for runs get a tooltip, and a link where the run has a page.
    """
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):  # ids that no other figure of the page has
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)

    def describe(found: re.Match[str]) -> str:
        title, address = f"<title>{escape(unquote(found['title']))}</title>", page(found["run"])
        if address is None:
            return f"<g>{title}{found['point']}</g>"
        return f'<a href="{escape(address)}" target="_blank" rel="noopener">{title}{found["point"]}</a>'

    svg = text.getvalue().replace("#000000", "currentColor")  # black lines and text are white on a dark page
    point = rf'<a xlink:href="{figures.POINT}(?P<run>[0-9a-f]*)/(?P<title>[^"]*)"[^>]*>(?P<point>.*?)</a>'
    return Markup(re.sub(point, describe, svg[svg.index("<svg") :], flags=re.DOTALL))
