"""Faults during a run: bad steps, hangs, slow ranks, copies that differ."""
