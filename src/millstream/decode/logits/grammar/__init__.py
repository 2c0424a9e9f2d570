"""Structured output: of the tokens that could come next, only those that can still lead to what was asked for.

The host half walks a grammar (llguidance) along the tokens of each output and gives a mask for the next one; the device
half takes everything else out of the logits. An output ends when its grammar is complete, and an end token can be
chosen only where it may be.
"""

from millstream.core.registry import Card

CARD = Card("grammar", "structured output: JSON Schema, regex, choice, Lark or GBNF grammar, by llguidance")
