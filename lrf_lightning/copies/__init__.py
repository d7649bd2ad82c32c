"""Copies of models, whatever users keep in them and however their weights are spread."""
