"""The data sets of `sim/data.py`, by the name that experiments know: their records are keyed to their own text."""

from millstream.sim.data import DataSet, find, lengths, read, text

__all__ = ["DataSet", "find", "lengths", "read", "text"]
