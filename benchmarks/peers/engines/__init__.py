"""One module an engine, each run in its engine's own environment: `python -m peers.engines.vllm SETUP`."""
