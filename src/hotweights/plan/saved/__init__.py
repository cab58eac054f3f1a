"""Saving a plan, and reading it again without trusting the file."""
