"""Readers: other packages that read files. One file each, imported when it is named."""
