"""Readers: other packages that read files. Each has a file here, which is imported when the package is asked for."""
