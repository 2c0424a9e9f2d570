"""Grammars of structured output: what may be asked for, and how it is compiled, in a process that may die of it.

`build.py` makes a matcher out of a `Structured` (llguidance); `check.py` holds the bounds; `worker.py` is the process
that tries a grammar out; `compiler.py` is what others call: it answers whether a grammar can be taken, and remembers.
"""
