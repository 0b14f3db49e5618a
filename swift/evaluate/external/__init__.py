"""Evaluation by other packages: each in a process of its own, with its own numbers in our report."""
