"""One token after the other: each output token is sampled from the logits of the one before it."""

from millstream.core.registry import Card

CARD = Card("autoregressive", "one token a step, sampled")
