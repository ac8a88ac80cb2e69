"""The table of recipes in the documents is the one of the code."""

from pathlib import Path

from sinkgd.lab.train.recipes import RECIPES, Recipe

# Options of SinkGD beyond the paper, which the documents list by themselves.
OFF = {
    "adapters": None,
    "cautious_decay": None,
    "momentum_place": "before",
    "momentum_bits": None,
    "momentum_rank": None,
    "low_rank_momentum": None,
    "cross_fit": None,
    "averaged_scales": None,
    "deflated_start": None,
    "weight_projection": None,
    "constant_norm": None,
    "last": "column",
    "operator_norm": None,
    "base_width": None,
    "tables": "adamw",
    "tables_lr": None,
    "whitened": "all",
}
DOCS = Path(__file__).parents[4] / "docs/recipes.md"


def row(recipe: Recipe) -> str:
    given = {name: value for name, value in recipe.defaults.items() if name not in OFF}
    values = ", ".join(f"{name} {value}" for name, value in given.items() if value not in (0, None))
    return f"| `{recipe.name}` | {recipe.summary} | {values} | {recipe.source} |"


def test_every_recipe_is_in_the_documents_with_its_values_and_their_source():
    rows = [row(recipe) for recipe in RECIPES.values()]
    text = DOCS.read_text(encoding="utf-8")
    missing = "\n".join(own for own in rows if own not in text)
    assert not missing, f"docs/recipes.md needs these rows:\n{missing}"
    assert "\n".join(rows) in text, "the rows of docs/recipes.md stand in another order"


def test_values_of_zero_are_what_the_documents_say_they_are():
    zeros = {name for r in RECIPES.values() for name, value in r.defaults.items() if value == 0}
    assert zeros == {"weight_decay", "clip_norm", "rank", "momentum", "nesterov", "deflated_rank"}


def test_options_that_are_off_are_listed_with_their_values():
    text = DOCS.read_text(encoding="utf-8")
    for recipe in RECIPES.values():
        for name, value in recipe.defaults.items():
            if name in OFF:
                assert value == OFF[name]
                assert f"| `{name}` | {'none' if value is None else value} |" in text
