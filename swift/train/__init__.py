"""Training: read run.py first."""
