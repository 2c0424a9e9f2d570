"""Tools: what a model may call, how its family writes a call, and the grammar that holds it to that.

`protocol.py` says what a format is; `formats/` has one a file; `scan.py` and `calls.py` read text as it comes;
`lark.py` writes grammars; `prompt.py` is for models whose template knows no tools; `output.py` puts reasoning and
calls together into the deltas of one output.
"""
