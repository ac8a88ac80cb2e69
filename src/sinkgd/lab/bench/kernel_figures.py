"""The figures of `sinkgd bench kernels` as tables and charts."""

from sinkgd.lab.bench.charts import Series, dots, lines
from sinkgd.lab.bench.kernels import SQUARES, CaseTiming, KernelsRecord
from sinkgd.lab.bench.sheet import Sheet
from sinkgd.lab.report.charts import Chart


def case_sheet(case: CaseTiming) -> Sheet:
    """Make the table of one case."""
    best = next(b for b in case.bandwidths if b.name == case.bandwidth)
    rate = best.bytes_per_second.median / 1e9
    return Sheet(
        title=f"{case.case}, {case.dtype}",
        note=f"Share: of {rate:.1f} GB/s, the fastest that was measured here ({best.name}).",
        columns=("operation", "µs", "GB/s", "share"),
        rows=tuple(
            (
                f"{timing.backend}: {timing.operation}",
                f"{1e6 * timing.call_seconds.median:,.1f}",
                f"{timing.bytes_per_second.median / 1e9:.2f}",
                f"{timing.share.median:.0%} [{timing.share.lower:.0%}, {timing.share.upper:.0%}]",
            )
            for timing in case.timings
        ),
    )


def kernel_charts(record: KernelsRecord) -> list[Chart]:
    """Draw the shares of the measured bandwidth in each type that was timed."""
    charts = []
    for dtype in dict.fromkeys(case.dtype for case in record.cases):
        cases = [case for case in record.cases if case.dtype == dtype]
        squares = {
            size: case for size in SQUARES for case in cases if case.case == f"{size}x{size}"
        }
        if len(squares) > 1:
            charts.append(_squares(dtype, squares))
        charts.append(_all(dtype, cases))
    return charts


def _rows(case: CaseTiming) -> list[tuple[str, str]]:
    return [(timing.backend, timing.operation) for timing in case.timings]


def _squares(dtype: str, squares: dict[int, CaseTiming]) -> Chart:
    rows = _rows(next(iter(squares.values())))
    shares = {
        row: [t.share.median for case in squares.values() if (t := case.timing(*row))]
        for row in rows
    }
    described = "; ".join(
        f"{': '.join(row)} {', '.join(f'{s:.0%}' for s in shares[row])}" for row in rows
    )
    return Chart(
        key=f"squares-{dtype}",
        title=f"Square matrices, {dtype}",
        caption="Bytes a second as a share of the fastest streaming operation on the same matrix; "
        "what is read again from a cache counts each time, so that a share may exceed 100 %.",
        description=f"Sizes {', '.join(map(str, squares))}. {described}.",
        figure=lines(
            list(squares),
            [(": ".join(row), shares[row]) for row in rows],
            x="rows and columns",
            y="share of the bandwidth",
        ),
        share=1,
    )


def _all(dtype: str, cases: list[CaseTiming]) -> Chart:
    rows = list(dict.fromkeys(row for case in cases for row in _rows(case)))
    described = "; ".join(
        f"{case.case}: "
        + ", ".join(
            f"{': '.join(row)} {t.share.median:.0%}" for row in rows if (t := case.timing(*row))
        )
        for case in cases
    )
    return Chart(
        key=f"shapes-{dtype}",
        title=f"Every shape, {dtype}",
        caption="Share of the measured bandwidth; right is faster. Dots are medians, whiskers "
        "quartiles.",
        description=f"{described}.",
        figure=dots(
            [case.case for case in cases],
            [
                Series(
                    ": ".join(row),
                    color,
                    {i: t.share for i, case in enumerate(cases) if (t := case.timing(*row))},
                )
                for color, row in enumerate(rows)
            ],
            unit="share of the bandwidth",
            one="all of it",
        ),
        share=1,
    )
