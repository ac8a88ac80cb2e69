"""All charts of what was measured, in the order of the page."""

from sinkgd.lab.report.analysis import Analysis
from sinkgd.lab.report.bar_charts import bar_charts
from sinkgd.lab.report.charts import Chart
from sinkgd.lab.report.identity import Identity
from sinkgd.lab.report.inner_charts import inner_charts
from sinkgd.lab.report.loss_charts import loss_chart


def measured_charts(analysis: Analysis, identities: dict[str, Identity]) -> list[Chart]:
    """Draw losses, bars, and the inner workings of models that have any."""
    return [
        loss_chart(analysis, identities, "tokens"),
        loss_chart(analysis, identities, "seconds"),
        *bar_charts(analysis, identities),
        *inner_charts(analysis, identities),
    ]
