"""Engines: adapters to other packages, one file or folder for each. Each is imported only when it is named."""
