"""Packing a float model into codes of 4 or 8 bits, calibrated on text: QServe's QoQ, piece by piece.

`recipe.py` says what is done, `observe.py` runs the model a layer at a time and keeps what its matrices saw,
`transforms.py` are the changes that leave a layer's result alone and make it easier to round, `run.py` is all of it in
order, `save.py` writes the folder. The rounding itself is the format's own (`formats/weights/`).
"""
