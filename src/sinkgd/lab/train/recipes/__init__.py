"""Optimizers with their common settings, each with the source of the settings."""

from sinkgd.lab.train.recipes.recipe import Recipe as Recipe
from sinkgd.lab.train.recipes.recipe_table import RECIPES as RECIPES
from sinkgd.lab.train.recipes.recipe_table import build_optimizer as build_optimizer
from sinkgd.lab.train.recipes.recipe_table import find_recipe as find_recipe
from sinkgd.lab.train.recipes.recipe_table import resolve_optimizer as resolve_optimizer
