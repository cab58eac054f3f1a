"""Where a decision stands that all hosts can read, by kind of address: ``table``."""
