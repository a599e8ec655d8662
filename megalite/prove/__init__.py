"""Proofs that a layout trains the same, and measurements of layouts."""
