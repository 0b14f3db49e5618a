"""Quantizers: weights in few bits, block by block, in the checkpoints that engines load. One contract (base.py)."""
