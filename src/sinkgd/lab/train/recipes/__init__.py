"""Optimizers as they are commonly run, each with the source of its values."""

from sinkgd.lab.train.recipes.contract import Recipe as Recipe
from sinkgd.lab.train.recipes.table import RECIPES as RECIPES
from sinkgd.lab.train.recipes.table import build_optimizer as build_optimizer
from sinkgd.lab.train.recipes.table import find_recipe as find_recipe
from sinkgd.lab.train.recipes.table import resolve_optimizer as resolve_optimizer
