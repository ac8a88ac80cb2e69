"""Render a page from a template: one self-contained HTML file that needs no network.

The template extends ``shell.html`` and escapes every string. Figures and plotly.js are inlined, and
a content security policy forbids the page to load anything. `from_cdn` replaces plotly.js by its
address, for repositories and web sites; a page then takes 0.1 to 0.5 MB instead of 5 MB.
"""

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs, get_plotlyjs_version

from sinkgd.lab.report.figures import Chart

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
        title: Title of the page, plain text.
        charts: Charts to draw in the elements whose ids are the charts' keys.
        filters: Functions with which the template formats values, by name.
        content: Values that the template shows, by name.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _FOLDER]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # NaN is not valid JSON; `tojson` escapes everything that could end the script element.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters.update(filters)
    return environment.get_template(template.name).render(
        title=title,
        charts=charts,
        figures={chart.key: chart.figure for chart in charts},
        plotly=get_plotlyjs(),
        css=_read("page.css"),
        javascript=_read("page.js", "cost.js"),
        **content,
    )


def _read(*names: str) -> str:
    return "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in names)


_ADDRESS = f"https://cdn.plot.ly/plotly-{get_plotlyjs_version()}.min.js"
_POLICY = "script-src 'unsafe-inline'"


def from_cdn(page: str) -> str:
    """Replace the text of plotly.js by its address at the publisher's CDN.

    The browser accepts the file only if it has the same SHA-384 as the text. The page's policy
    allows no other address.

    Args:
        page: HTML made by `render`.
    """
    plotly = get_plotlyjs()
    digest = base64.b64encode(hashlib.sha384(plotly.encode()).digest()).decode()
    script = (
        f'<script src="{_ADDRESS}" integrity="sha384-{digest}" crossorigin="anonymous"></script>'
    )
    return page.replace(f"<script>{plotly}</script>", script, 1).replace(
        _POLICY, f"{_POLICY} {_ADDRESS}", 1
    )
