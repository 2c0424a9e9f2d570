"""Presence, frequency and repetition penalties, as OpenAI's API and CTRL define them."""

from millstream.core.registry import Card

CARD = Card("penalties", "presence, frequency and repetition penalties")
