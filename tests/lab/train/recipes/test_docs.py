"""The table of recipes in the documents is the one of the code."""

from pathlib import Path

from sinkgd.lab.train.recipes import RECIPES, Recipe

DOCS = Path(__file__).parents[4] / "docs/lab.md"


def row(recipe: Recipe) -> str:
    values = ", ".join(f"{name} {value}" for name, value in recipe.defaults.items() if value != 0)
    return f"| `{recipe.name}` | {recipe.summary} | {values} | {recipe.source} |"


def test_every_recipe_is_in_the_documents_with_its_values_and_their_source():
    rows = "\n".join(map(row, RECIPES.values()))
    assert rows in DOCS.read_text(encoding="utf-8"), f"docs/lab.md needs these rows:\n{rows}"


def test_values_of_zero_are_what_the_documents_say_they_are():
    zeros = {name for r in RECIPES.values() for name, value in r.defaults.items() if value == 0}
    assert zeros == {"weight_decay", "clip_norm", "rank"}
