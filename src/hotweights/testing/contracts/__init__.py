"""Contracts that anybody can run against an implementation of their own."""
