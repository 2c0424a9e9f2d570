"""Millstream itself, with whatever weights the setup names: "blocks" is its fast path, "dense" is float32."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from peers.protocol import imported, serve


class Millstream:
    def __init__(self, setup: Mapping[str, Any]) -> None:
        import torch

        import millstream
        from millstream import LLM, SamplingParams
        from millstream.engine.resolve import kv_choice

        imported()
        torch.set_num_threads(setup["threads"])
        weights = setup.get("weights", "blocks")
        self._llm = LLM(
            setup["model"],
            weights=weights,
            max_context=setup["max_context"],
            cache={"bytes": setup.get("cache", "3GiB"), "prefix": "none"},
            runner={"threads": setup["threads"]},
        )
        self._params = SamplingParams
        resolved = self._llm.assembled.resolved
        budget = next((one.value for one in resolved.decisions if one.name == "sched.step_tokens"), "as configured")
        precision = "float32"
        if weights == "blocks":
            precision = f"{self._llm.assembled.source.quantization} as stored, activations and KV int8"
        self.told = {
            "engine": "millstream",
            "version": millstream.__version__,
            "precision": precision,
            "set": f"step_tokens {budget}, KV {kv_choice(resolved.config)[0]}",
        }

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> list[list[int]]:
        params = self._params(max_tokens=output_len, temperature=0.0, ignore_eos=True)
        return [list(out.outputs[0].token_ids) for out in self._llm.generate(list(prompts), params)]

    def score(self, prompts: Sequence[Sequence[int]]) -> tuple[float, int]:
        scores = self._llm.score(list(prompts))
        return sum(score.logprob for score in scores), sum(score.num_scored for score in scores)

    def close(self) -> None:
        self._llm.close()


if __name__ == "__main__":
    sys.exit(serve(Millstream))
