"""Routing: one stream of tensors to several components, each with loading code of its own."""
