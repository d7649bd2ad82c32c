"""A result in pictures."""
