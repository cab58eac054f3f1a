"""Contracts: checks that you can run against a source, a pool or a transport of your own."""
