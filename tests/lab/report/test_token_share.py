"""The share of another run's tokens that a run needs for the other's final loss."""

import math

import pytest

from lab.report.synthetic_runs import write_run
from sinkgd.lab.report.token_share import MeanShare, token_share


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({5: 6.0, 10: 5.0, 20: 3.0}, 0.75),  # 4.0 after 15 of 20 steps
        ({5: 6.0, 10: 5.0, 20: 4.0}, 1.0),
        ({5: 6.0, 10: 5.5, 20: 4.5}, 20 / 15),  # which the other reaches after 15
        ({5: 6.0, 20: 3.0, 40: 2.0}, 0.75),  # a longer run: 4.0 after 15 steps of the other's 20
        ({5: 6.0, 40: 4.5}, 40 / 15),
        ({5: 3.9, 20: 3.0}, math.nan),  # the first evaluation is below the other's end
        ({5: 9.0, 20: 6.5}, math.inf),  # the other's first evaluation is below its end
    ],
)
def test_the_share_of_tokens(tmp_path, losses, expected):
    other = write_run(tmp_path, "adamw", {5: 6.0, 10: 5.0, 20: 4.0})
    found = token_share(write_run(tmp_path, "sinkgd", losses), other)
    assert found == pytest.approx(expected, nan_ok=True)


def test_the_share_of_each_is_the_inverse_of_the_other(tmp_path):
    one = write_run(tmp_path, "sinkgd", {5: 5.9, 10: 5.1, 15: 4.2, 20: 3.7})
    other = write_run(tmp_path, "adamw", {5: 6.0, 10: 5.0, 15: 4.5, 20: 4.0})
    assert token_share(one, other) * token_share(other, one) == pytest.approx(1)


def test_a_run_that_failed_has_no_share(tmp_path):
    ended = write_run(tmp_path, "adamw", {5: 6.0, 20: 4.0})
    failed = write_run(tmp_path, "sinkgd", {5: 6.0}, status="failed")
    assert token_share(failed, ended) == math.inf
    assert math.isnan(token_share(ended, failed))
    assert math.isnan(token_share(failed, failed))


def test_the_mean_is_geometric_with_students_interval():
    # Worked by hand: logs of 2 are -1, 0, 1; mean 0, deviation 1, t(2) = 4.303.
    found = MeanShare.of([0.5, 1.0, 2.0])
    width = 4.303 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((1, 2**-width, 2**width))
    single = MeanShare.of([0.9])
    assert (single.mean, single.low, single.high) == (pytest.approx(0.9), 0, math.inf)
    assert str(single) == "90\xa0%"
    assert MeanShare.of([]) is MeanShare.of([0.9, math.nan]) is None
