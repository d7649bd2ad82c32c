"""A result in words, numbers and tables."""
