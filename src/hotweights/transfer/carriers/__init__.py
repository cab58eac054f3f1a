"""How bytes get from one host to another, by name: ``table``."""
