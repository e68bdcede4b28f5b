"""Measurements, run by hand; README.md lists them."""
