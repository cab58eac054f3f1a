"""Engines: one file or folder for each; each speaks only its engine's seams."""
