"""Recipes of the application: one module with data and model each, chosen by ``recipe=NAME``."""
