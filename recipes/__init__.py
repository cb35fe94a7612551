"""Recipes: one YAML file says everything about a run; `recipes.schema` reads and checks it."""
