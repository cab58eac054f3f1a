"""Sharded trainers: every rank sends what it holds, one of them leads, and nobody gathers."""
