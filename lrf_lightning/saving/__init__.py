"""Compressed models as files, and back, without running code from a file."""
