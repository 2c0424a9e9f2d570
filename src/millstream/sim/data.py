"""Public data sets for benchmarks: found in $MILLSTREAM_DATA, else in the cache, else downloaded from where they come.

Only what an experiment here reads is listed. A downloaded file is kept in the form that the data folder has.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from millstream.config.load import data_dir, home
from millstream.core.errors import BadFile, DownloadError, UnknownName

_TIMEOUT_S = 60
_MAX_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class DataSet:
    """One file: where it lies in a data folder, the public file it is made from, and how.

    Without a `source` it is made of many files, by hand, and is not downloaded.
    """

    path: str
    repository: str
    commit: str
    source: str
    licence: str
    convert: Callable[[bytes], bytes] = lambda data: data

    @property
    def url(self) -> str:
        return f"https://raw.githubusercontent.com/{self.repository}/{self.commit}/{self.source}"


def _every_second_row(data: bytes) -> bytes:
    header, *rows = data.decode().splitlines(keepends=True)
    return (header + "".join(rows[::2])).encode()


def _lines_where(wanted: Callable[[str], bool]) -> Callable[[bytes], bytes]:
    return lambda data: "".join(filter(wanted, data.decode().splitlines(keepends=True))).encode()


def _first_rows(count: int) -> Callable[[bytes], bytes]:
    return lambda data: "".join(data.decode().splitlines(keepends=True)[:count]).encode()


# The traces are parts of longer ones; each begins where its source begins.
_azure_part = _lines_where(lambda line: not line[:1].isdigit() or line.split(" ")[1] < "18:55:00")
_mooncake_part = _lines_where(lambda line: json.loads(line)["timestamp"] < 2_400_000)
_burst_part = _lines_where(lambda line: float(line) < 4800)


def _sound_blocks(data: bytes) -> bytes:
    """The first 92 rows whose blocks of 512 tokens are as many as their lengths say."""
    rows = [(line, json.loads(line)) for line in data.decode().splitlines(keepends=True)[:200]]
    sound = [line for line, row in rows if -(-row["input_length"] // 512) == len(row["hash_ids"])]
    return "".join(sound[:92]).encode()


def _first_of_each_category(count: int) -> Callable[[bytes], bytes]:
    def convert(data: bytes) -> bytes:
        seen: dict[str, int] = {}
        lines = []
        for line in data.decode().splitlines(keepends=True):
            category = str(json.loads(line)["category"])
            seen[category] = seen.get(category, 0) + 1
            if seen[category] <= count:
                lines.append(line)
        return "".join(lines).encode()

    return convert


def _strategy_questions(data: bytes) -> bytes:
    return "".join(json.dumps({"question": row["question"]}) + "\n" for row in json.loads(data)[:600]).encode()


def _first_sessions(count: int) -> Callable[[bytes], bytes]:
    def convert(data: bytes) -> bytes:
        kept: dict[str, None] = {}
        lines = []
        for line in data.decode().splitlines(keepends=True):
            session = str(json.loads(line)["session_id"])
            if session in kept or len(kept) < count:
                kept[session] = None
                lines.append(line)
        return "".join(lines).encode()

    return convert


def _first_workflows(count: int) -> Callable[[bytes], bytes]:
    """A JSON list of {"Text2SQLRequest": calls} as lines of {"calls": calls}."""

    def convert(data: bytes) -> bytes:
        rows = [{"calls": one["Text2SQLRequest"]} for one in json.loads(data)[:count]]
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    return convert


SETS = {
    "sharegpt-lengths": DataSet(
        "traces_lengths/sharegpt_8k.csv.gz",
        "project-etalon/etalon",
        "d5f18de15a22",
        "data/processed_traces/sharegpt_8k_filtered_stats_llama2_tokenizer.csv",
        "Apache-2.0",
        _every_second_row,
    ),
    "wikitext2-test": DataSet(
        "lm_perplexity/wikitext2_test.txt.gz",
        "pytorch/examples",
        "77f55b912142",
        "word_language_model/data/wikitext-2/test.txt",
        "CC BY-SA 3.0",
    ),
    "wikitext2-train": DataSet(
        "lm_train/wikitext2_train_5k.txt.gz",
        "NagusameCS/HyperTensor",
        "fe7264328a06",
        "data/wikitext2_train_5k.txt",
        "CC BY-SA 3.0",
    ),
    "sharegpt-prompts": DataSet(
        "chat_sharegpt_workload/8min_up_and_down.jsonl.gz",
        "vllm-project/aibrix",
        "e3e10f9e4aeb",
        "benchmarks/scenarios/autoscaling/workload/8min_up_and_down.jsonl",
        "Apache-2.0",
        _first_rows(1400),
    ),
    "oasst-prompts": DataSet(
        "chat_oasst/en_100_tree.jsonl.gz",
        "LAION-AI/Open-Assistant",
        "f1e6ed9526f5",
        "model/model_eval/manual/data/en_100_tree.jsonl",
        "Apache-2.0",
        _first_rows(60),
    ),
    "gsm8k-train": DataSet(
        "lm_gsm8k/train_head.jsonl.gz",
        "openai/grade-school-math",
        "3101c7d50724",
        "grade_school_math/data/train.jsonl",
        "MIT",
        _first_rows(2000),
    ),
    "arena-hard": DataSet(
        "lm_arena_hard/question.jsonl",
        "lmarena/arena-hard-auto",
        "196f6b826783",
        "data/arena-hard-v0.1/question.jsonl",
        "Apache-2.0",
        _first_rows(300),
    ),
    "mbpp": DataSet(
        "lm_mbpp/mbpp.jsonl",
        "amazon-science/mxeval",
        "e09974f990ee",
        "data/mbxp/mbpp_release_v1.jsonl",
        "CC BY 4.0",
        _first_rows(500),
    ),
    "humaneval": DataSet(
        "lm_humaneval/HumanEval.jsonl",
        "openai/human-eval",
        "6d43fb980f9f",
        "data/HumanEval.jsonl.gz",
        "MIT",
        lambda data: _first_rows(100)(gzip.decompress(data)),
    ),
    "banking77": DataSet(
        "topic_banking77/train.csv.gz",
        "PolyAI-LDN/task-specific-datasets",
        "57ec275d8078",
        "banking_data/train.csv",
        "CC BY 4.0",
    ),
    "ifeval": DataSet(
        "lm_ifeval/input_data.jsonl",
        "josejg/instruction_following_eval",
        "0c495b2f9515",
        "instruction_following_eval/data/input_data.jsonl",
        "Apache-2.0",
        _first_rows(320),
    ),
    "mt-bench": DataSet(
        "lm_mtbench/question.jsonl",
        "lm-sys/FastChat",
        "0e6d3e4beaab",
        "fastchat/llm_judge/data/mt_bench/question.jsonl",
        "Apache-2.0",
        _first_of_each_category(6),
    ),
    "vicuna-bench": DataSet(
        "lm_mtbench/vicuna_question.jsonl",
        "lm-sys/FastChat",
        "0e6d3e4beaab",
        "fastchat/llm_judge/data/vicuna_bench/question.jsonl",
        "Apache-2.0",
    ),
    "strategyqa": DataSet(
        "lm_strategyqa/train_head.jsonl",
        "eladsegal/strategyqa",
        "1ba1e97452e1",
        "data/strategyqa/train.json",
        "MIT",
        _strategy_questions,
    ),
    "truthfulqa": DataSet(
        "lm_truthfulqa/TruthfulQA.csv",
        "frankxwang/probing-experiments",
        "b7eb5a9f55e2",
        "data/TruthfulQA.csv",
        "Apache-2.0",
        _first_rows(501),
    ),
    "ag-news": DataSet(
        "topic_ag_news/test.csv.gz",
        "mhjabreel/CharCnn_Keras",
        "555590db4219",
        "data/ag_news_csv/test.csv",
        "non-commercial research",
        _first_rows(5000),
    ),
    "lambada": DataSet(
        "lm_lambada/test.jsonl.gz",
        "cybertronai/bflm",
        "620fff70127e",
        "lambada_test.jsonl",
        "CC BY 4.0",
        _first_rows(2500),
    ),
    "aqua": DataSet("lm_aqua/dev.jsonl", "deepmind/AQuA", "26b64ed1f222", "dev.json", "Apache-2.0"),
    "azure-conv": DataSet(
        "traces_azure2023/conv.csv.gz",
        "Azure/AzurePublicDataset",
        "b469a113cedc",
        "data/AzureLLMInferenceTrace_conv.csv",
        "CC BY 4.0",
        _azure_part,
    ),
    "azure-code": DataSet(
        "traces_azure2023/code.csv.gz",
        "Azure/AzurePublicDataset",
        "b469a113cedc",
        "data/AzureLLMInferenceTrace_code.csv",
        "CC BY 4.0",
        _azure_part,
    ),
    "mooncake-conversation": DataSet(
        "traces_mooncake/conversation.jsonl.gz",
        "kvcache-ai/Mooncake",
        "3b5a59413395",
        "FAST25-release/traces/conversation_trace.jsonl",
        "Apache-2.0",
        _mooncake_part,
    ),
    "mooncake-synthetic": DataSet(
        "traces_mooncake/synthetic.jsonl.gz",
        "kvcache-ai/Mooncake",
        "3b5a59413395",
        "FAST25-release/traces/synthetic_trace.jsonl",
        "Apache-2.0",
        _first_rows(2000),
    ),
    "mooncake-toolagent": DataSet(
        "traces_mooncake/toolagent_sample.jsonl",
        "hiverge/dynamo",
        "4915d8fa2d36",
        "mooncake_trace.jsonl",
        "Apache-2.0",
        _sound_blocks,
    ),
    "burstgpt": DataSet(
        "traces_burstgpt/arrivals_day29_33.txt",
        "NJUDeepEngine/Loquetier",
        "aae33baeeb19",
        "tests/configs/burstgpt_day29and33_partial.txt",
        "CC BY 4.0",
        _burst_part,
    ),
    "arxiv-lengths": DataSet(
        "traces_lengths/arxiv_summarization.csv.gz",
        "project-etalon/etalon",
        "d5f18de15a22",
        "data/processed_traces/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv",
        "Apache-2.0",
        _every_second_row,
    ),
    "bwb-lengths": DataSet(
        "traces_lengths/bwb.csv.gz",
        "project-etalon/etalon",
        "d5f18de15a22",
        "data/processed_traces/bwb_stats_llama2_tokenizer_filtered_v2.csv",
        "Apache-2.0",
        _every_second_row,
    ),
    "agents-swebench": DataSet(
        "traces_agents/exgentic_swebench.jsonl.gz",
        "fnstggl/energy2",
        "2d7bc9a76ffe",
        "data/external/hf/Exgentic__agent-llm-traces/swebench_claude_code_shard12/processed/normalized_sample.jsonl",
        "CDLA-Permissive-2.0",
        _first_sessions(27),
    ),
    "agents-coding": DataSet(
        "traces_agents/cc_traces.jsonl.gz",
        "fnstggl/energy2",
        "2d7bc9a76ffe",
        "data/external/hf/semianalysisai__cc-traces-weka-no-subagents-051226/traces_3000mib/processed/"
        "normalized_sample.jsonl",
        "Apache-2.0",
        _first_sessions(12),
    ),
    "hexgen-formula1": DataSet(
        "traces_hexgen_flow/formula1.jsonl.gz",
        "Relaxed-System-Lab/Hexgen-Flow",
        "396a3babc937",
        "simulator/cli/input_file_formula1.json",
        "none given; lengths and names of steps only",
        _first_workflows(18),
    ),
    "hexgen-financial": DataSet(
        "traces_hexgen_flow/financial.jsonl.gz",
        "Relaxed-System-Lab/Hexgen-Flow",
        "396a3babc937",
        "simulator/cli/input_file_financial.json",
        "none given; lengths and names of steps only",
        _first_workflows(60),
    ),
    "spider-questions": DataSet(
        "text2sql_spider/questions.jsonl", "cloudera/spiderman", "c11367b8dbe1", "", "CC BY-SA 4.0"
    ),
    "spider-world": DataSet(
        "text2sql_spider/databases/world_1.sqlite", "cloudera/spiderman", "c11367b8dbe1", "", "CC BY-SA 4.0"
    ),
    "splitwise-times": DataSet(
        "profiles_splitwise/perf_model.csv.gz",
        "Mutinifni/splitwise-sim",
        "8f99e7dc9b40",
        "data/perf_model.csv",
        "MIT",
    ),
    "vidur-a100-llama2-7b": DataSet(
        "profiles_vidur/a100_Llama-2-7b-hf_mlp.csv.gz",
        "microsoft/vidur",
        "7d47513363ec",
        "data/profiling/compute/a100/meta-llama/Llama-2-7b-hf/mlp.csv",
        "MIT",
    ),
    "vidur-a100-llama3-8b": DataSet(
        "profiles_vidur/a100_Meta-Llama-3-8B_mlp.csv.gz",
        "microsoft/vidur",
        "7d47513363ec",
        "data/profiling/compute/a100/meta-llama/Meta-Llama-3-8B/mlp.csv",
        "MIT",
    ),
    "vidur-a100-llama2-70b": DataSet(
        "profiles_vidur/a100_Llama-2-70b-hf_mlp.csv.gz",
        "microsoft/vidur",
        "7d47513363ec",
        "data/profiling/compute/a100/meta-llama/Llama-2-70b-hf/mlp.csv",
        "MIT",
    ),
    "vidur-a100-phi-2": DataSet(
        "profiles_vidur/a100_phi-2_mlp.csv.gz",
        "microsoft/vidur",
        "7d47513363ec",
        "data/profiling/compute/a100/microsoft/phi-2/mlp.csv",
        "MIT",
    ),
    "servegen-small": DataSet("traces_servegen/m-small.jsonl.gz", "alibaba/ServeGen", "f891d1189eb3", "", "Apache-2.0"),
    "servegen-mid": DataSet("traces_servegen/m-mid.jsonl.gz", "alibaba/ServeGen", "f891d1189eb3", "", "Apache-2.0"),
    "servegen-reason": DataSet(
        "traces_servegen/deepseek-r1.jsonl.gz", "alibaba/ServeGen", "f891d1189eb3", "", "Apache-2.0"
    ),
}


def find(name: str, download: bool = True) -> Path:
    """The file of a data set. Raises UnknownName, and DownloadError when it is neither here nor to be had."""
    if name not in SETS:
        raise UnknownName("data set", name, SETS)
    entry = SETS[name]
    folder = data_dir()
    for root in (folder, home() / "data"):
        if root is not None and (root / entry.path).is_file():
            return root / entry.path
    if not entry.source:
        raise DownloadError(
            f"data set {name} is made of many files of https://github.com/{entry.repository} and is not downloaded; "
            f"put it at {home() / 'data' / entry.path}, or set MILLSTREAM_DATA to a folder that has it"
        )
    if not download:
        raise DownloadError(f"data set {name} is not here; set MILLSTREAM_DATA to a folder with {entry.path}")
    try:
        with urllib.request.urlopen(entry.url, timeout=_TIMEOUT_S) as answer:
            data = answer.read(_MAX_BYTES + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise DownloadError(
            f"data set {name} could not be downloaded from {entry.url}: {error}. "
            f"Put it at {home() / 'data' / entry.path}, or set MILLSTREAM_DATA to a folder that has it"
        ) from error
    if len(data) > _MAX_BYTES:
        raise DownloadError(f"data set {name} is over {_MAX_BYTES} bytes")
    path = home() / "data" / entry.path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    converted = entry.convert(data)
    part.write_bytes(gzip.compress(converted, mtime=0) if path.suffix == ".gz" else converted)
    part.replace(path)
    return path


def text(name: str) -> str:
    """A text data set, decompressed. Raises BadFile when it is damaged."""
    return read(find(name))


def read(path: Path) -> str:
    """A text file, decompressed when it ends in .gz. Raises BadFile when it is damaged or not there."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise BadFile(path, f"cannot be read: {error.strerror}") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BadFile(path, f"is damaged: {error}") from error


def lengths(name: str) -> list[tuple[int, int]]:
    """(prompt tokens, output tokens) of each row of a lengths data set. Raises BadFile naming the line."""
    rows = csv.DictReader(io.StringIO(text(name)))
    out = []
    for line, row in enumerate(rows, start=2):
        try:
            out.append((int(row["num_prefill_tokens"]), int(row["num_decode_tokens"])))
        except (KeyError, TypeError, ValueError) as error:
            raise BadFile(find(name), f"line {line}: {error}") from error
    return out
