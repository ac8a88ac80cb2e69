"""The shell of every page: one self-contained HTML file that needs no network.

A template that extends ``shell.html`` gives the content. Every string is escaped by the template.
Figures and plotly.js are inlined, and a content security policy forbids the page to load anything.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from sinkgd.lab.report.charts import Chart

_FOLDER = Path(__file__).parent


def render(
    template: Path,
    *,
    title: str,
    charts: Sequence[Chart],
    filters: Mapping[str, Callable[..., str]],
    **content: Any,
) -> str:
    """Make a page's HTML.

    Args:
        template: A file that extends ``shell.html``, with the blocks ``main`` and ``footer``.
        title: Of the page, plain text.
        charts: To draw, wherever the template puts an element with a chart's key.
        filters: What the template may write values with, by name.
        content: What the template shows, by name.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _FOLDER]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # A NaN would be no JSON; `tojson` escapes what could end the script element.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters.update(filters)
    return environment.get_template(template.name).render(
        title=title,
        charts=charts,
        figures={chart.key: chart.figure for chart in charts},
        plotly=get_plotlyjs(),
        css=_read("page.css", "blocks.css"),
        javascript=_read("page.js", "cost.js"),
        **content,
    )


def _read(*names: str) -> str:
    return "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in names)
