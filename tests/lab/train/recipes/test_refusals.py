"""Options that do not go together are an error of the configuration, and not a traceback."""

import pytest

from lab.train.recipes.tiny import built, tiny_model
from sinkgd.lab.train.config import ConfigError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross_fit": True, "momentum": 0.5}, "cross_fit=True takes scales from a part"),
        ({"cross_fit": True, "momentum_rank": 2}, "cross_fit=True takes scales from a part"),
        ({"cross_fit": True, "tables": "sinkgd-table"}, "cross_fit=True takes scales from a part"),
        ({"constant_norm": True, "weight_decay": 0.1}, "constant_norm=True"),
    ],
    ids=str,
)
def test_options_that_the_library_refuses(options, message):
    with pytest.raises(ConfigError, match=rf"recipe 'sinkgd' does not take these.*{message}"):
        built(tiny_model(), "sinkgd", **options)
