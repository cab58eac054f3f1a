"""A module's tensors, wherever they hang."""
