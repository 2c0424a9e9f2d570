"""Tokens made likelier, less likely, or impossible: logit_bias, and the stop tokens while min_tokens is not reached."""

from millstream.core.registry import Card

CARD = Card("bias", "logit_bias, and stop tokens banned until min_tokens")
