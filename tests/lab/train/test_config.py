"""Every option explains itself."""

import ast
import inspect
import itertools
from dataclasses import fields, is_dataclass

from sinkgd.lab.train import config


def documented_fields(kind: type) -> set[str]:
    """Return the fields of a dataclass that a docstring follows."""
    body = ast.parse(inspect.getsource(kind)).body[0].body
    pairs = itertools.pairwise(body)
    return {
        line.target.id
        for line, following in pairs
        if isinstance(line, ast.AnnAssign)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
    }


def test_every_field_has_a_help_text():
    tables = [field.type for field in fields(config.RunConfig)]
    assert len(tables) == 8
    for table in tables:
        assert is_dataclass(table)
        assert documented_fields(table) == {field.name for field in fields(table)}


def test_a_comparison_shares_all_but_the_optimizer():
    shared = {field.name for field in fields(config.SharedConfig)}
    assert shared | {"optimizer"} == {field.name for field in fields(config.RunConfig)}
