"""The 79 techniques: number, name, room and the switch that turns each one on.

The list is data. What a plug-in says of itself is read from its `CARD` without importing the module,
so that listing the papers stays fast and needs no torch.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import millstream
from millstream.core import registry
from millstream.core.errors import UnknownName
from millstream.core.registry import Card


@dataclass(frozen=True, slots=True)
class Paper:
    """One technique. `name` is also the name of its experiment; `room` is where its plug-in lives.

    `built_in` says how to reach a technique that is the engine itself and so has no plug-in of its own.
    """

    number: int
    name: str
    short: str
    title: str
    room: str
    built_in: str = ""

    @property
    def switch(self) -> str:
        """How a user turns it on: the config keys of its plug-ins, or "-" while there is none.

        A plug-in whose point no config key names is given as "point: name".
        """
        found = [where.switch for where in plugin_cards() if where.card.paper == self.number]
        parts = ", ".join(f"`{switch}`" for switch in found)
        if self.built_in:
            return f"{self.built_in} ({parts})" if parts else self.built_in
        return parts or "-"


@dataclass(frozen=True, slots=True)
class PlacedCard:
    """A plug-in's Card and the extension point it stands at."""

    point: str
    card: Card

    @property
    def switch(self) -> str:
        key = SWITCHES.get(self.point)
        return f"{key}={self.card.name}" if key else f"{self.point}: {self.card.name}"


# The config key that picks a plug-in of a point, as in `--set sched.policies=fcfs`.
SWITCHES: Mapping[str, str] = {
    "policy": "sched.policies",
    "meter": "sched.meters",
    "length": "sched.lengths",
    "prefix": "cache.prefix",
    "kv": "cache.kv",
    "weights": "model.weights",
    "decode": "decode",
    "attention": "runner.attention",
}


PAPERS: tuple[Paper, ...] = (
    Paper(
        1,
        "hexgen-text2sql",
        "HexGen-Text2SQL",
        "HEXGEN-TEXT2SQL: Optimizing LLM Inference Request Scheduling for Agentic Text-to-SQL Workflow",
        "sched/policies, cluster, programs",
    ),
    Paper(
        2,
        "beyond-inference",
        "Beyond Inference",
        "Beyond Inference: Performance Analysis of DNN Server Overheads for Computer Vision",
        "media",
    ),
    Paper(
        3,
        "petals",
        "Petals",
        "Distributed Inference and Fine-tuning of Large Language Models Over The Internet",
        "cluster",
    ),
    Paper(
        4,
        "intel-gpu",
        "Intel GPU: fusion and segment KV",
        "Efficient LLM inference solution on Intel GPU",
        "memory, models, ops",
        built_in="`decode=beam`; forks and fused ops are on by default",
    ),
    Paper(
        5,
        "gear",
        "GEAR",
        "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM",
        "formats/kv",
    ),
    Paper(
        6,
        "ic-cache",
        "IC-Cache",
        "IC-Cache: Efficient Large Language Model Serving via In-context Caching",
        "cluster",
    ),
    Paper(
        7,
        "job-search",
        "Semantic job search",
        "Scaling Up Efficient Small Language Models Serving and Deployment for Semantic Job Search",
        "formats/weights, retrieval",
    ),
    Paper(
        8,
        "shadowkv",
        "ShadowKV",
        "ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference",
        "formats/select",
    ),
    Paper(
        9,
        "moe-lens",
        "MoE-Lens",
        "MoE-Lens: Towards the Hardware Limit of High-Throughput MoE LLM Serving Under Resource Constraints",
        "runner/experts",
    ),
    Paper(
        10,
        "relayattention",
        "RelayAttention",
        "RelayAttention for Efficient Large Language Model Serving with Long System Prompts",
        "ops/attention",
        built_in="`runner.shared_prefix=one-level`",
    ),
    Paper(
        11,
        "pagedattention",
        "PagedAttention",
        "Efficient Memory Management for Large Language Model Serving with PagedAttention",
        "memory, sched",
        built_in="on by default",
    ),
    Paper(
        12,
        "sample-factory",
        "Sample Factory",
        "Sample Factory: Egocentric 3D Control from Pixels at 100000 FPS with Asynchronous Reinforcement Learning",
        "rl",
    ),
    Paper(
        13,
        "envpool",
        "EnvPool",
        "EnvPool: A Highly Parallel Reinforcement Learning Environment Execution Engine",
        "rl",
    ),
    Paper(14, "hqi", "HQI", "High-Throughput Vector Similarity Search in Knowledge Graphs", "retrieval"),
    Paper(
        15,
        "s3",
        "S³",
        "S³: Increasing GPU Utilization during Generative Inference for Higher Throughput",
        "sched/policies, sched/predictors",
    ),
    Paper(
        16,
        "step-3",
        "Step-3",
        "Step-3 is Large yet Affordable: Model-system Co-design for Cost-effective Decoding",
        "runner/experts, models",
    ),
    Paper(17, "e-batch", "E-BATCH", "E-BATCH: Energy-Efficient and High-Throughput RNN Batching", "models"),
    Paper(
        18,
        "pice",
        "PICE",
        "PICE: A Semantic-Driven Progressive Inference System for LLM Serving in Cloud-Edge Networks",
        "programs",
    ),
    Paper(
        19,
        "fastgen",
        "FastGen Dynamic SplitFuse",
        "DeepSpeed-FastGen: High-throughput Text Generation for LLMs via MII and DeepSpeed-Inference",
        "sched",
        built_in="on by default",
    ),
    Paper(
        20,
        "streamdiffusionv2",
        "StreamDiffusionV2",
        "StreamDiffusionV2: A Streaming System for Dynamic and Interactive Video Generation",
        "media",
    ),
    Paper(
        21,
        "elaswave",
        "ElasWave",
        "ElasWave: An Elastic-Native System for Scalable Hybrid-Parallel Training",
        "train",
    ),
    Paper(
        22,
        "moe-gen",
        "MoE-Gen",
        "MoE-Gen: High-Throughput MoE Inference on a Single GPU with Module-Based Batching",
        "runner/experts",
    ),
    Paper(23, "anylogo", "AnyLogo", "AnyLogo: Symbiotic Subject-Driven Diffusion System with Gemini Status", "media"),
    Paper(
        24,
        "apparate",
        "Apparate",
        "Apparate: Rethinking Early Exits to Tame Latency-Throughput Tensions in ML Serving",
        "decode",
    ),
    Paper(
        25,
        "hydragen",
        "Hydragen",
        "Hydragen: High-Throughput LLM Inference with Shared Prefixes",
        "ops/attention",
        built_in="`runner.shared_prefix=tree`, on by default",
    ),
    Paper(
        26,
        "supergen",
        "SuperGen",
        "SuperGen: An Efficient Ultra-high-resolution Video Generation System with Sketching and Tiling",
        "media",
    ),
    Paper(
        27,
        "qserve",
        "QServe",
        "QServe: W4A8KV4 Quantization and System Co-design for Efficient LLM Serving",
        "formats/weights, formats/kv",
        built_in="`millstream quantize MODEL --out DIR`",
    ),
    Paper(
        28,
        "energonai",
        "EnergonAI",
        "EnergonAI: An Inference System for 10-100 Billion Parameter Transformer Models",
        "cluster",
    ),
    Paper(29, "cloud-native", "Cloud native serving", "Cloud Native System for LLM Inference Serving", "cluster"),
    Paper(
        30,
        "kvshare",
        "KVShare",
        "KVShare: An LLM Service System with Efficient and Effective Multi-Tenant KV Cache Reuse",
        "memory/prefix",
    ),
    Paper(
        31,
        "flexllm",
        "FlexLLM",
        "FlexLLM: A System for Co-Serving Large Language Model Inference and Parameter-Efficient Finetuning",
        "coserve",
    ),
    Paper(
        32,
        "fp6-llm",
        "FP6-LLM",
        "FP6-LLM: Efficiently Serving Large Language Models Through FP6-Centric Algorithm-System Co-Design",
        "formats/weights",
    ),
    Paper(
        33,
        "sysllmatic",
        "SysLLMatic",
        "SysLLMatic: Large Language Models are Software System Optimizers",
        "programs",
    ),
    Paper(
        34,
        "text2topic",
        "Text2Topic",
        "Text2Topic: Multi-Label Text Classification System for Efficient Topic Detection in User Generated Content "
        "with Zero-Shot Capabilities",
        "retrieval",
    ),
    Paper(
        35,
        "tiny-time-series",
        "Tiny Time-series Transformer",
        "The Tiny Time-series Transformer: Low-latency High-throughput Classification of Astronomical Transients using "
        "Deep Model Compression",
        "formats/weights",
    ),
    Paper(
        36,
        "code-verifier",
        "Reward models for code verification",
        "Reward Models Enable Scalable Code Verification by Trading Accuracy for Throughput",
        "programs",
    ),
    Paper(
        37,
        "se-moe",
        "SE-MoE",
        "SE-MoE: A Scalable and Efficient Mixture-of-Experts Distributed Training and Inference System",
        "runner/experts, train",
    ),
    Paper(
        38,
        "amd-training",
        "Full-stack AMD training (ZAYA1)",
        "Training Foundation Models on a Full-Stack AMD Platform: Compute, Networking, and System Design",
        "models, train",
    ),
    Paper(39, "bass", "BASS", "BASS: Batched Attention-optimized Speculative Sampling", "decode"),
    Paper(40, "apollo", "APOLLO", "APOLLO: SGD-like Memory, AdamW-level Performance", "train"),
    Paper(
        41,
        "tim",
        "TIM and TIMRUN",
        "Beyond Context Limits: Subconscious Threads for Long-Horizon Reasoning",
        "memory",
    ),
    Paper(
        42,
        "autellix",
        "Autellix",
        "Autellix: An Efficient Serving Engine for LLM Agents as General Programs",
        "sched/policies",
    ),
    Paper(
        43,
        "deltazip",
        "DeltaZip",
        "DeltaZip: Multi-Tenant Language Model Serving via Delta Compression",
        "formats/deltas",
    ),
    Paper(
        44,
        "diffusionpipe",
        "DiffusionPipe",
        "DiffusionPipe: Training Large Diffusion Models with Efficient Pipelines",
        "train",
    ),
    Paper(45, "motif-2", "Motif-2-12.7B", "Motif 2 12.7B technical report", "models, train"),
    Paper(46, "punica", "Punica", "Punica: Multi-Tenant LoRA Serving", "formats/deltas"),
    Paper(47, "agentfly", "AgentFly", "AgentFly: Extensible and Scalable Reinforcement Learning for LM Agents", "rl"),
    Paper(
        48,
        "trimr",
        "TrimR",
        "TrimR: Verifier-based Training-Free Thinking Compression for Efficient Test-Time Scaling",
        "decode/observers",
    ),
    Paper(
        49, "pensieve", "Pensieve", "Stateful Large Language Model Serving with Pensieve", "memory/tiers, memory/evict"
    ),
    Paper(50, "refrag", "REFRAG", "REFRAG: Rethinking RAG based Decoding", "programs"),
    Paper(
        51,
        "refactorcoderqa",
        "RefactorCoderQA",
        "RefactorCoderQA: Benchmarking LLMs for Multi-Domain Coding Question Solutions in Cloud and Edge Deployment",
        "programs",
    ),
    Paper(
        52,
        "speech-dialogue",
        "SpeechDialogueFactory",
        "SpeechDialogueFactory: Generating High-Quality Speech Dialogue Data to Accelerate Your Speech-LLM Development",
        "programs",
    ),
    Paper(
        53,
        "alisa",
        "ALISA",
        "ALISA: Accelerating Large Language Model Inference via Sparsity-Aware KV Caching",
        "formats/select",
    ),
    Paper(
        54,
        "anywherevla",
        "AnywhereVLA",
        "AnywhereVLA: Language-Conditioned Exploration and Mobile Manipulation",
        "media",
    ),
    Paper(
        55,
        "janus",
        "Janus",
        "Janus: Disaggregating Attention and Experts for Scalable MoE Inference",
        "runner/experts",
    ),
    Paper(
        56,
        "ssm",
        "SSM and hybrid long context",
        "Characterizing State Space Model (SSM) and SSM-Transformer Hybrid Language Model Performance with "
        "Long Context Length",
        "models",
    ),
    Paper(
        57,
        "nexus",
        "Nexus",
        "Nexus: Proactive Intra-GPU Disaggregation of Prefill and Decode in LLM Serving",
        "sched/policies",
    ),
    Paper(
        58,
        "hygen",
        "HyGen",
        "HyGen: Efficient LLM Serving via Elastic Online-Offline Request Co-location",
        "sched/policies",
    ),
    Paper(
        59,
        "lazydp",
        "LazyDP",
        "LazyDP: Co-Designing Algorithm-Software for Scalable Training of Differentially Private Recommendation Models",
        "train",
    ),
    Paper(
        60,
        "edge-nas",
        "Accelerator-aware network design",
        "Accelerator-aware Neural Network Design using AutoML",
        "train",
    ),
    Paper(
        61,
        "ltr",
        "Learning-to-rank scheduling",
        "Efficient LLM Scheduling by Learning to Rank",
        "sched/policies, sched/predictors",
    ),
    Paper(
        62,
        "instinfer",
        "InstInfer",
        "InstInfer: In-Storage Attention Offloading for Cost-Effective Long-Context LLM Inference",
        "memory/tiers",
    ),
    Paper(
        63,
        "rlinf",
        "RLinf",
        "RLinf: Flexible and Efficient Large-scale Reinforcement Learning via Macro-to-Micro Flow Transformation",
        "rl",
    ),
    Paper(64, "dlpm", "DLPM and D2LPM", "Locality-aware Fair Scheduling in LLM Serving", "sched/policies, cluster"),
    Paper(
        65,
        "flashdp",
        "FlashDP",
        "FlashDP: Private Training Large Language Models with Efficient DP-SGD",
        "train",
    ),
    Paper(66, "fires", "FIRES", "Batch-based Model Registration for Fast 3D Sherd Reconstruction", "media"),
    Paper(67, "dota-rag", "DoTA-RAG", "DoTA-RAG: Dynamic of Thought Aggregation RAG", "programs, retrieval"),
    Paper(
        68,
        "infinite-llm",
        "Infinite-LLM",
        "Infinite-LLM: Efficient LLM Service for Long Context with DistAttention and Distributed KVCache",
        "ops/attention, memory/tiers",
    ),
    Paper(69, "lopa", "LoPA", "LoPA: Scaling dLLM Inference via Lookahead Parallel Decoding", "decode"),
    Paper(
        70,
        "dart",
        "DART",
        "Efficient Multi-turn RL for GUI Agents via Decoupled Training and Adaptive Data Curation",
        "rl",
    ),
    Paper(
        71,
        "ring-lite",
        "Ring-lite and C3PO",
        "Ring-lite: Scalable Reasoning via C3PO-Stabilized Reinforcement Learning for LLMs",
        "models, rl",
    ),
    Paper(72, "d2d-sharding", "D2D pair sharding", "Device to Device Pairs Sharding based on Distance", "tools"),
    Paper(
        73,
        "syenet",
        "SYENet",
        "SYENet: A Simple Yet Effective Network for Multiple Low-Level Vision Tasks with Real-time Performance on "
        "Mobile Device",
        "media",
    ),
    Paper(
        74,
        "loquetier",
        "Loquetier",
        "Loquetier: A Virtualized Multi-LoRA Framework for Unified LLM Fine-tuning and Serving",
        "formats/deltas, coserve",
    ),
    Paper(75, "lvq", "LVQ", "Similarity search in the blink of an eye with compressed indices", "retrieval"),
    Paper(
        76,
        "recommenders",
        "Personalized recommendation",
        "The Architectural Implications of Facebook's DNN-based Personalized Recommendation",
        "models",
    ),
    Paper(
        77,
        "sentinel-tokens",
        "Sentinel tokens",
        "Context Compression for Auto-regressive Transformers with Sentinel Tokens",
        "formats/select",
    ),
    Paper(
        78,
        "system-cards",
        "Blueprints of Trust",
        "Blueprints of Trust: AI System Cards for End to End Transparency and Governance",
        "tools",
    ),
    Paper(
        79,
        "dafny",
        "Dafny as intermediate language",
        "Dafny as Verification-Aware Intermediate Language for Code Generation",
        "programs",
    ),
)


def find(name: str) -> Paper:
    """The paper with this experiment name, or this number. Raises UnknownName with the nearest one."""
    for paper in PAPERS:
        if name in (paper.name, str(paper.number)):
            return paper
    raise UnknownName("paper", name, (paper.name for paper in PAPERS))


@cache
def plugin_cards() -> tuple[PlacedCard, ...]:
    """The Card of every plug-in at every extension point but `experiment`, by point, then name."""
    placed = [
        PlacedCard(point, card)
        for point in registry.points()
        if point != "experiment"
        for card in _built_in_cards(point)
    ]
    # One scan of the installed packages for all points: a scan takes tens of milliseconds.
    outside = importlib.metadata.entry_points()
    for point in registry.points():
        if point != "experiment":
            placed += [
                PlacedCard(point, registry.card(point, entry.name))
                for entry in outside.select(group=f"millstream.{point}")
            ]
    order = registry.points()
    return tuple(sorted(placed, key=lambda where: (order.index(where.point), where.card.name)))


def _built_in_cards(point: str) -> Iterator[Card]:
    folder = _folder(registry.POINTS[point])
    for path in sorted(folder.iterdir()) if folder else ():
        source = path / "__init__.py" if path.is_dir() else path
        if path.stem.startswith("_") or path.stem in registry.NOT_PLUGINS:
            continue
        if source.suffix == ".py" and source.is_file():
            found = read_card(source)
            if found is not None:
                yield found


def _folder(package: str) -> Path | None:
    folder = Path(millstream.__file__).parent.joinpath(*package.split(".")[1:])
    return folder if folder.is_dir() else None


def read_card(source: Path) -> Card | None:
    """The `CARD = Card(...)` of a plug-in's source file, read without running the file.

    None when the file has no such line. A card whose fields are not literals is taken by importing the module.
    """
    text = source.read_text(encoding="utf-8")
    if "CARD" not in text:
        return None
    for node in ast.parse(text, filename=source.name).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and target.id == "CARD" and isinstance(value, ast.Call):
            try:
                return _literal_card(value)
            except (ValueError, TypeError):
                return _imported_card(source)
    return None


def _literal_card(call: ast.Call) -> Card:
    given: dict[str, Any] = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    if len(given) != len(call.keywords):
        raise ValueError("a card with ** arguments is not literal")
    return Card(*(ast.literal_eval(argument) for argument in call.args), **given)


def _imported_card(source: Path) -> Card:
    parts = source.with_suffix("").relative_to(Path(millstream.__file__).parent.parent).parts
    name = ".".join(part for part in parts if part != "__init__")
    found: Card = importlib.import_module(name).CARD
    return found
