"""Objects: checkpoints in object stores and on the web, read by ranges."""
