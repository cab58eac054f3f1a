"""Routing: one stream of tensors to several components."""
