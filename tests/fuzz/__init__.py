"""Fuzzing what reads the bytes of strangers: `python -m tests.fuzz TARGET`, and a short run of each target with every test run."""
