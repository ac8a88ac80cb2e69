"""The shell of every page: one self-contained HTML file that needs no network.

A template that extends ``shell.html`` gives the content. Every string is escaped by the template.
Figures and plotly.js are inlined, and a content security policy forbids the page to load anything.
`from_cdn` takes plotly.js out again: a twentieth of the size, for repositories and web sites.
"""

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs, get_plotlyjs_version

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


_ADDRESS = f"https://cdn.plot.ly/plotly-{get_plotlyjs_version()}.min.js"
_POLICY = "script-src 'unsafe-inline'"


def from_cdn(page: str) -> str:
    """Return the page with plotly.js as an address at its publisher's in the place of its text.

    The browser takes the file only if its SHA-384 is that of the text, and the page's policy allows
    this address beside the page itself and no other.

    Args:
        page: HTML of `shell.render`.
    """
    plotly = get_plotlyjs()
    digest = base64.b64encode(hashlib.sha384(plotly.encode()).digest()).decode()
    script = (
        f'<script src="{_ADDRESS}" integrity="sha384-{digest}" crossorigin="anonymous"></script>'
    )
    return page.replace(f"<script>{plotly}</script>", script, 1).replace(
        _POLICY, f"{_POLICY} {_ADDRESS}", 1
    )
