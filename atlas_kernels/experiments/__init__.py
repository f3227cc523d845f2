"""Experiments: configured runs of every method, the paper's tables, and their report."""
