"""Measures sweeper beside its peers and the floors of the machine. Run it: `python -m bench`."""
