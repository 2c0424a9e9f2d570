"""OpenVINO GenAI's continuous batching pipeline, over a GGUF file as it is or an exported folder.

`python -m peers.engines.openvino convert HF_FOLDER FOLDER int4|int8` makes such a folder with optimum-intel and nncf:
int4 asymmetric in groups of 64 inputs (the last layer int8, as is its default), or int8 for each output.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peers.protocol import imported, serve

PRECISIONS = {"gguf": "as the GGUF file stores them", "int4": "int4, groups of 64", "int8": "int8 for each output"}


class OpenVino:
    def __init__(self, setup: Mapping[str, Any]) -> None:
        import numpy
        import openvino
        import openvino_genai as genai

        imported()
        self._genai = genai
        self._tensor = lambda ids: openvino.Tensor(numpy.array([ids], dtype=numpy.int64))
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = setup.get("cache_gb", 4)
        scheduler.enable_prefix_caching = False
        scheduler.max_num_seqs = setup["max_batch"]
        scheduler.max_num_batched_tokens = setup.get("step_tokens", 512)
        properties = {"INFERENCE_NUM_THREADS": setup["threads"], "PERFORMANCE_HINT": "LATENCY"}
        self._pipeline = genai.ContinuousBatchingPipeline(
            setup["path"], scheduler_config=scheduler, device="CPU", properties=properties
        )
        core = openvino.Core()
        kv, computes, group = (
            core.get_property("CPU", name)
            for name in ("KV_CACHE_PRECISION", "INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
        )
        self.told = {
            "engine": "openvino-genai",
            "version": genai.__version__,
            "precision": PRECISIONS[setup["precision"]],
            "set": f"max_num_batched_tokens {scheduler.max_num_batched_tokens}, "
            f"activations int8 in groups of {group}, else {computes.get_type_name()}, KV {kv.get_type_name()}",
        }

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> list[list[int]]:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = output_len
        config.ignore_eos = True
        config.do_sample = False
        found = self._pipeline.generate([self._tensor(ids) for ids in prompts], [config] * len(prompts))
        return [list(one.m_generation_ids[0]) for one in found]


def convert(source: Path, folder: Path, kind: str) -> None:
    """A Hugging Face folder as OpenVINO's own, weights compressed."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    if kind == "int4":
        how = OVWeightQuantizationConfig(bits=4, sym=False, group_size=64, ratio=1.0)
    else:
        how = OVWeightQuantizationConfig(bits=8, sym=False)
    model = OVModelForCausalLM.from_pretrained(source, export=True, quantization_config=how, compile=False)
    model.save_pretrained(folder)
    _tokenizer(source, folder)


def _tokenizer(source: Path, folder: Path) -> None:
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder)
    made = convert_tokenizer(tokenizer, with_detokenizer=True)
    for model, name in zip(made, ("openvino_tokenizer", "openvino_detokenizer"), strict=True):
        openvino.save_model(model, folder / f"{name}.xml")


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
        sys.exit(0)
    sys.exit(serve(OpenVino))
