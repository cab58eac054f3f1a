"""Loading: a plan is run from a source into memory, and proven."""
