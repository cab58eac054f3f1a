"""Addresses ``ray:NAME``: a named actor that knows the sender, and relays that are actors."""
