"""Checks of the hosts before a run: `tools/doctor.py`."""
