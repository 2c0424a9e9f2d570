"""vLLM's CPU build in bfloat16, over an exported folder. Compiled at its first start, which takes minutes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from peers.protocol import imported, serve


class Vllm:
    def __init__(self, setup: Mapping[str, Any]) -> None:
        # One process, so that stopping it stops all of it; threads and KV as for the others.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(setup.get("cache_gb", 4)))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{setup['threads'] - 1}")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import vllm

        imported()
        self._vllm = vllm
        self._llm = vllm.LLM(
            setup["path"],
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=setup["max_context"],
            max_num_seqs=setup["max_batch"],
            seed=0,
        )
        self.told = {
            "engine": "vllm-cpu",
            "version": vllm.__version__,
            "precision": "bfloat16",
            "set": f"KV bfloat16, {os.environ['VLLM_CPU_KVCACHE_SPACE']} GiB",
        }

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> list[list[int]]:
        params = self._vllm.SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        found = self._llm.generate(asked, params, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found]


if __name__ == "__main__":
    sys.exit(serve(Vllm))
