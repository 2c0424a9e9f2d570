"""Device half of beam search: the logprobs come from the plain method."""

from millstream.core import registry

PLUGIN = registry.get_device("decode", "autoregressive")
