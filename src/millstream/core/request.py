"""What is asked of an engine. Every bound is checked here, once, and breaking one raises BadRequest."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from millstream.core.errors import BadRequest, RequestFault
from millstream.core.registry import Choice

MAX_N = 128
MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIAS = 1024
MAX_SEED = 2**63 - 1
MAX_SECONDS = 1e9
MAX_PRIORITY = 2**63 - 1
MAX_STRUCTURED_CHARS = 1 << 18
MAX_LEAD_CHARS = 1024
MAX_PROGRAM_CHARS = 512
MAX_STAGE_CHARS = 128
MAX_PARENTS = 1024
MAX_CALL = 2**63 - 1


def _integer(param: str, got: object, low: int, high: int) -> None:
    if not isinstance(got, int) or isinstance(got, bool) or not low <= got <= high:
        raise BadRequest(param, got, f"an integer from {low} to {high}")


def _number(param: str, got: object, low: float, high: float, above: bool = False) -> None:
    fine = isinstance(got, int | float) and not isinstance(got, bool) and math.isfinite(got)
    if not fine or not low <= got <= high or (above and got == low):  # type: ignore[operator]
        raise BadRequest(param, got, f"a number {'above' if above else 'from'} {low:g} to {high:g}")


class Kind(enum.Enum):
    """GENERATE samples tokens; SCORE computes the prompt's logprobs only; EMBED returns a vector."""

    GENERATE = "generate"
    SCORE = "score"
    EMBED = "embed"


@dataclass(frozen=True, slots=True)
class Tokens:
    """A stretch of prompt given as token ids.

    Who made them, and so knows that they are whole numbers from 0 to `below` - 1, may say it: nobody looks then.
    """

    ids: tuple[int, ...]
    below: int | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Vectors:
    """A stretch of prompt given as embedding rows: raw bytes of `shape` (tokens, width), row-major."""

    data: bytes
    dtype: str
    shape: tuple[int, int]

    def __len__(self) -> int:
        return self.shape[0]


Segment = Tokens | Vectors


STRUCTURED_KINDS = ("json_object", "json_schema", "regex", "choice", "grammar")


@dataclass(frozen=True, slots=True)
class Structured:
    """What an output must look like, as the text of a grammar.

    `text` is, by `kind`: nothing (json_object: any JSON object), a JSON Schema (json_schema), a regular expression that
    the whole output matches (regex), a JSON list of strings (choice), a Lark or GBNF grammar (grammar). With `strict` a
    keyword of a schema that cannot be enforced is refused, without it such keywords are passed over. `lead` is the body
    of a Lark rule for what may come before, such as thinking. What the texts say is checked where they are compiled
    (`text/grammar`). Raises BadRequest for an unknown kind, and a text that is empty or too long.
    """

    kind: str
    text: str = ""
    strict: bool = True
    lead: str = ""

    def __post_init__(self) -> None:
        if self.kind not in STRUCTURED_KINDS:
            raise BadRequest("structured.kind", self.kind, ", ".join(STRUCTURED_KINDS))
        if not isinstance(self.strict, bool):
            raise BadRequest("structured.strict", self.strict, "true or false")
        if not isinstance(self.text, str):
            raise BadRequest(f"structured.{self.kind}", self.text, "a text")
        if not isinstance(self.lead, str) or len(self.lead) > MAX_LEAD_CHARS:
            raise BadRequest("structured.lead", self.lead, f"a text of at most {MAX_LEAD_CHARS} characters")
        if self.kind == "json_object":
            object.__setattr__(self, "text", "")
        elif not self.text:
            raise BadRequest(f"structured.{self.kind}", self.text, "a text that is not empty")
        elif len(self.text) > MAX_STRUCTURED_CHARS:
            raise BadRequest(
                f"structured.{self.kind}", f"{len(self.text)} characters", f"at most {MAX_STRUCTURED_CHARS}"
            )

    @classmethod
    def json(cls, schema: Mapping[str, object] | str | None = None, strict: bool = True) -> Structured:
        """JSON that fits a schema; without one, any JSON object."""
        if schema is None:
            return cls("json_object")
        return cls("json_schema", schema if isinstance(schema, str) else _json("json_schema", schema), strict)

    @classmethod
    def regex(cls, pattern: str) -> Structured:
        """A text that the pattern matches as a whole."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, options: Sequence[str]) -> Structured:
        """One of the given texts."""
        return cls("choice", _json("choice", [options] if isinstance(options, str) else list(options)))

    @classmethod
    def grammar(cls, text: str) -> Structured:
        """A text of the language of a Lark or GBNF grammar with a rule `start` (GBNF: `root`)."""
        return cls("grammar", text)


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    # Usually all are well, which is found out faster than which one is not.
    if not (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size):
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise BadRequest("prompt", token, f"token ids from 0 to {vocab_size - 1}")


def _json(kind: str, value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRequest(f"structured.{kind}", value, f"plain JSON ({error})") from None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen, and when generation ends.

    `temperature` 0 is greedy. `top_k` 0 or -1 and `top_p` 1.0 are off. `logprobs` and `prompt_logprobs` ask for
    that many alternatives beside the token itself (0: the token only); they are those of the model, before
    temperature and penalties. Without `seed` the engine draws one per request. `stop` strings are cut off the
    text unless `include_stop_str_in_output`. `max_tokens` None means up to the end of the context. `structured` says
    what the output must look like: only tokens that can lead there are chosen, and it ends when it is complete.
    Raises BadRequest when a value is out of bounds.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured: Structured | None = None

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise BadRequest("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        if self.seed is not None:
            _integer("seed", self.seed, 0, MAX_SEED)
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                _integer(name, count, 0, MAX_TOP_LOGPROBS)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise BadRequest(name, getattr(self, name), "true or false")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or len(stop) > MAX_STOP_STRINGS:
            raise BadRequest("stop", stop, f"at most {MAX_STOP_STRINGS} strings")
        for text in stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARS:
                raise BadRequest("stop", text, f"strings of 1 to {MAX_STOP_CHARS} characters")
        if not isinstance(self.stop_token_ids, Sequence) or len(self.stop_token_ids) > MAX_LOGIT_BIAS:
            raise BadRequest("stop_token_ids", self.stop_token_ids, f"at most {MAX_LOGIT_BIAS} token ids")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 2**31 - 1)
        if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise BadRequest("logit_bias", self.logit_bias, f"a mapping of at most {MAX_LOGIT_BIAS} token ids")
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0, 2**31 - 1)
            _number("logit_bias", bias, -100.0, 100.0)
        if self.structured is not None and not isinstance(self.structured, Structured):
            raise BadRequest("structured", self.structured, "a Structured, such as Structured.json(schema)")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @property
    def greedy(self) -> bool:
        # Below this a division by the temperature overflows float32 for ordinary logits.
        return self.temperature < 1e-5

    @property
    def reads_history(self) -> bool:
        """Whether the next token's logits depend on which tokens came before, beyond the model itself."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


@dataclass(frozen=True, slots=True)
class Slo:
    """What the client expects, in seconds: first token, pace after it, and the whole.

    `ttft_s`, `tpot_s` and `e2e_s` (the whole, from arrival) are wishes that policies read. `deadline_s` after its
    arrival a request ends, whatever became of it until then. Raises BadRequest for what is not a positive number.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    deadline_s: float | None = None
    e2e_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "deadline_s", "e2e_s"):
            if (seconds := getattr(self, name)) is not None:
                _number(name, seconds, 0.0, MAX_SECONDS, above=True)

    def met(self, ttft_s: float | None, tpot_s: float | None, e2e_s: float) -> bool | None:
        """Whether what came keeps all that was wished for; None where nothing was.

        What there was none of (the pace of a single token) breaks no wish.
        """
        pairs = ((self.ttft_s, ttft_s), (self.tpot_s, tpot_s), (self.e2e_s, e2e_s))
        wished = [(most, got) for most, got in pairs if most is not None]
        return all(got is None or got <= most for most, got in wished) if wished else None


@dataclass(frozen=True, slots=True)
class Program:
    """The place of a call in a workflow of many calls: calls of one `thread` follow each other.

    `stage` names the step of the workflow that it is, `parents` are the calls whose ends it waited for, by their
    `call`: none for the first ones, None where nobody said. `service_s` is what the program had been served elsewhere
    when the call was made (seconds of model time, its longest path). Raises BadRequest when a value is out of bounds.
    """

    id: str
    call: int = 0
    thread: int = 0
    stage: str = ""
    parents: tuple[int, ...] | None = None
    service_s: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not 0 < len(self.id) <= MAX_PROGRAM_CHARS:
            raise BadRequest("program.id", self.id, f"a text of 1 to {MAX_PROGRAM_CHARS} characters")
        _integer("program.call", self.call, 0, MAX_CALL)
        _integer("program.thread", self.thread, 0, MAX_CALL)
        if not isinstance(self.stage, str) or len(self.stage) > MAX_STAGE_CHARS:
            raise BadRequest("program.stage", self.stage, f"a text of at most {MAX_STAGE_CHARS} characters")
        _number("program.service_s", self.service_s, 0.0, MAX_SECONDS)
        if self.parents is not None:
            if not isinstance(self.parents, Sequence) or len(self.parents) > MAX_PARENTS:
                raise BadRequest("program.parents", self.parents, f"at most {MAX_PARENTS} numbers of calls")
            for parent in self.parents:
                _integer("program.parents", parent, 0, MAX_CALL)
            if self.call in self.parents:
                raise BadRequest("program.parents", self.call, "other calls than itself, which is what `call` numbers")
            object.__setattr__(self, "parents", tuple(self.parents))


@dataclass(frozen=True, slots=True)
class Hints:
    """What somebody guesses about a request. `oracle` holds the truth and is set only by an experiment's oracle arm.

    `score` is a ranker's: of two requests the one with the higher score is expected to end with fewer tokens.
    `expected_s` is how long it is expected to take here once it runs.
    """

    expected_output_len: int | None = None
    score: float | None = None
    expected_s: float | None = None
    oracle: int | None = None

    @property
    def oracle_output_len(self) -> int:
        """The true number of output tokens. Raises RequestFault where no oracle was set."""
        if self.oracle is None:
            raise RequestFault("the true output length is read, but this is no oracle arm")
        return self.oracle

    def filled(self, guess: Hints) -> Hints:
        """These hints, and where they say nothing those of `guess`; of an oracle nobody but the request says anything.

        Raises TypeError for what is no hint.
        """
        if not isinstance(guess, Hints):
            raise TypeError(f"a guess is Hints, got {guess!r:.60}")
        length = guess.expected_output_len if self.expected_output_len is None else self.expected_output_len
        score = guess.score if self.score is None else self.score
        expected_s = guess.expected_s if self.expected_s is None else self.expected_s
        return Hints(length, score, expected_s, self.oracle)


@dataclass(frozen=True, slots=True)
class Prior:
    """What an output had come to when the engine that made it was lost: the next engine takes it up from there.

    `tokens` count as output of this request everywhere: for max_tokens and min_tokens, penalties, stop strings and
    grammars. They are not sent again. An output that had `ended` is not made again.
    """

    index: int
    tokens: tuple[int, ...] = ()
    cumulative_logprob: float = 0.0
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine can take: used by `Request.check`."""

    vocab_size: int
    max_context: int
    kv_tokens: int
    kinds: frozenset[Kind] = frozenset({Kind.GENERATE, Kind.SCORE})
    adapters: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Request:
    """One ask. `id` is ours; `label` is the client's and is never used as a key.

    `background` work is computed in steps that nobody else has a part in: it gives way at once, with all it holds.
    `prior` says what of it was answered already, by an engine that is gone; it needs a seed (of what it had sampled).
    `affinity`: requests of one share a prefix, by what their client says; routers send them to one engine.
    """

    id: int
    prompt: tuple[Segment, ...]
    params: SamplingParams = SamplingParams()
    kind: Kind = Kind.GENERATE
    arrival: float = 0.0
    tenant: str = ""
    program: Program | None = None
    slo: Slo = Slo()
    priority: int = 0
    background: bool = False
    adapter: str = ""
    cache_salt: str = ""
    affinity: str = ""
    hints: Hints = Hints()
    decode: Choice | None = None
    label: str = ""
    prior: tuple[Prior, ...] = ()

    @property
    def num_prompt(self) -> int:
        return sum(len(segment) for segment in self.prompt)

    @property
    def prompt_ids(self) -> list[int]:
        if len(self.prompt) == 1 and isinstance(self.prompt[0], Tokens):
            return list(self.prompt[0].ids)
        return [token for segment in self.prompt if isinstance(segment, Tokens) for token in segment.ids]

    def check(self, limits: Limits) -> None:
        """Raises BadRequest when this engine cannot take the request, whatever its load."""
        self._check_types()
        if self.kind not in limits.kinds:
            raise BadRequest("kind", self.kind.value, ", ".join(sorted(k.value for k in limits.kinds)))
        if not all([isinstance(segment, Tokens) for segment in self.prompt]):
            raise BadRequest("prompt", "embedding rows", "token ids")
        count = self.num_prompt
        if count == 0:
            raise BadRequest("prompt", "an empty prompt", "at least one token")
        room = limits.max_context if self.kind is not Kind.GENERATE else limits.max_context - 1
        if count > room:
            kept = ", one token to generate" if room < limits.max_context else ""
            raise BadRequest("prompt", f"{count} tokens", f"at most {room} (context {limits.max_context}{kept})")
        if count > limits.kv_tokens:
            raise BadRequest("prompt", f"{count} tokens", f"at most {limits.kv_tokens}, all that the KV cache holds")
        asked = self.params.max_tokens
        if self.kind is Kind.GENERATE and asked is not None and count + asked > limits.max_context:
            raise BadRequest(
                "max_tokens",
                asked,
                f"at most {limits.max_context - count} (context {limits.max_context}, prompt {count} tokens)",
            )
        if self.prior:
            self._check_prior(limits)
        for segment in self.prompt:
            if isinstance(segment, Tokens) and segment.ids and not (segment.below or math.inf) <= limits.vocab_size:
                _check_ids(segment.ids, limits.vocab_size)
        for name, tokens in (
            ("logit_bias", self.params.logit_bias),
            ("stop_token_ids", self.params.stop_token_ids),
        ):
            for token in tokens:
                if token >= limits.vocab_size:
                    raise BadRequest(name, token, f"token ids from 0 to {limits.vocab_size - 1}")
        if self.adapter and self.adapter not in limits.adapters:
            raise BadRequest(
                "adapter", self.adapter, ", ".join(sorted(limits.adapters)) or "none: no adapter is loaded"
            )

    def _check_prior(self, limits: Limits) -> None:
        params = self.params
        if self.kind is not Kind.GENERATE:
            raise BadRequest("prior", self.kind.value, "outputs of a request that generates")
        if params.seed is None and not params.greedy:
            raise BadRequest("seed", None, "the seed that the prior output was sampled with")
        if params.prompt_logprobs is not None:
            raise BadRequest("prompt_logprobs", params.prompt_logprobs, "none: they came with the prior output")
        indexes = [prior.index for prior in self.prior]
        if len(set(indexes)) != len(indexes):
            raise BadRequest("prior", indexes, "each output once")
        most = limits.max_context - self.num_prompt
        most = most if params.max_tokens is None else min(most, params.max_tokens)
        for prior in self.prior:
            if not prior.ended and len(prior.tokens) >= most:
                raise BadRequest("prior", f"{len(prior.tokens)} tokens", f"fewer than {most}, or an ended output")
            for token in prior.tokens:
                if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < limits.vocab_size:
                    raise BadRequest("prior", token, f"token ids from 0 to {limits.vocab_size - 1}")
        if len(self.prior) and all(prior.ended for prior in self.prior) and len(self.prior) >= params.n:
            raise BadRequest("prior", "outputs that all ended", "at least one to go on with")

    def _check_types(self) -> None:
        # A wrong type found later would be found by the scheduler, in the midst of everybody's step.
        if not isinstance(self.kind, Kind):
            raise BadRequest("kind", self.kind, ", ".join(f"Kind.{kind.name}" for kind in Kind))
        if self.decode is not None and not isinstance(self.decode, Choice):
            raise BadRequest("decode", self.decode, "a Choice of a decode method, such as Choice('beam', {'width': 4})")
        _integer("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        if not isinstance(self.background, bool):
            raise BadRequest("background", self.background, "true or false")
        for name in ("tenant", "adapter", "cache_salt", "affinity", "label"):
            if not isinstance(getattr(self, name), str):
                raise BadRequest(name, getattr(self, name), "a string")
        for name, kind in (("params", SamplingParams), ("slo", Slo), ("hints", Hints)):
            if not isinstance(getattr(self, name), kind):
                raise BadRequest(name, getattr(self, name), f"{kind.__name__}")
        if self.program is not None and not isinstance(self.program, Program):
            raise BadRequest("program", self.program, "a Program")
