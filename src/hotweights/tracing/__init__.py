"""Tracing: a model's own loading code, run on fake tensors, becomes a plan."""
