"""Frozen data and the vocabulary that every other package shares. No I/O, no behaviour beyond what the data itself implies."""
