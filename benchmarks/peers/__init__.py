"""Millstream beside other CPU engines: the same prompts, the same threads, one process each, in turn.

    make bench-peers PEERS_ARGS="--model smollm2-135m --engines millstream,openvino --json out/peers.json"

export_hf   a GGUF file as a Hugging Face folder, for engines that read nothing else
install     a virtual environment for each engine, under .venv-peers/
protocol    commands to a worker process and its answers, a line of JSON each
engines     the workers: each loads one engine and answers generate
measures    what is measured, and how it is interleaved
report      medians, ratios, tables

The package is run, not installed: it needs `benchmarks/` on PYTHONPATH, which the Makefile and `measures` see to.
"""
