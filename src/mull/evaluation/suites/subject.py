"""What is evaluated, and what is asked of it."""

import functools
import hashlib
import itertools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from mull.data.tokenizer import TextEncoder
from mull.evaluation.suites.writers import OWN_ROUTE, AnswerReader, MullWriter, PlainWriter, Route, Writer
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import ETDConfig, MTPConfig
from mull.model.configuration import MullConfig
from mull.model.families import require_supported
from mull.model.path import from_layers
from mull.retrofit.reading import NO_CODE, explained
from mull.retrofit.source import find_source, load_config, load_tokenizer
from mull.retrofit.wrap import from_pretrained
from mull.runtime.arguments import Frozen

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MAX_SEED = 2**31 - 1
HASHED_AT_ONCE = 1 << 24
"""Elements of a tensor on its way from a GPU to be hashed."""

NO_SETTINGS = frozenset({"_name_or_path", "transformers_version", "requires", "dtype", "torch_dtype"})
"""Fields of a configuration that say where it came from, or what a result says elsewhere: the model's name and precision."""

NO_TEXT = {
    "tokenizer_config.json": frozenset({"is_local", "local_files_only"}),
    "tokenizer.json": frozenset({"padding", "truncation"}),
}
"""Keys of a tokenizer's files that say where it came from, or which call was its last one."""


class Request(Frozen):
    """Settings of an evaluation. What is None is as published with the suite."""

    samples: int | None = Field(default=None, ge=1)
    """Answers per problem; 1, and for ``meta-mtp`` 200 (CodeContests: 1000)."""

    temperatures: tuple[float, ...] | None = None
    """0, greedy decoding, and for ``meta-mtp`` 0.5 to 0.9. Of several, the maximum is reported, too, as an oracle's."""

    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    k: tuple[int, ...] | None = None
    """Of pass@k; those of 1, 10 and 100 that the samples allow."""

    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    max_new_tokens: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    """Rows at a time."""

    limit: int | None = Field(default=None, ge=1)
    """Only the first so many problems or, of suites that read text, documents: a ``.txt`` file is one, each line of a
    ``.jsonl`` file another. Of prompts that ``per-head-analysis`` and ``inference-speed`` continue, so many, too."""

    chat: bool | None = None
    """Put prompts into the tokenizer's chat template; default: if it has one."""

    draft_length: int | None = Field(default=None, ge=0)
    """Drafts per round; default: 1 if the model has extra heads, the fastest on a CPU. 0 drafts nothing."""

    etd: ETDConfig | None = None
    """Think block to give a checkpoint that has none, without any training."""

    mtp: Literal["native"] | None = None
    """Use the heads that Qwen3-Next and Qwen3.5 checkpoints have."""

    think_iterations: int | None = Field(default=None, ge=1)
    adaptive: bool | None = None
    layers: tuple[int, ...] | None = None
    """Layers to run, in order, instead of the model's own path."""

    engine: Literal["mull", "transformers"] | None = None
    """What writes; default: mull, and transformers for architectures that mull does not have."""

    compiled: bool = True
    """Measure compiled decoding, too, in ``inference-speed``; it takes minutes to compile."""

    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Precision; default: the checkpoint's."""

    data: dict[str, str] = {}
    """Source of each suite's problems; ``gsm8k-train`` for the examples of GSM8K's prompt, ``text`` for the suites that read
    text. Default: the suite's dataset on the hub, and for text, Python's library."""

    workers: int = Field(default=4, ge=1, le=1024)
    """Programs that are run at a time."""

    allow_weak: tuple[str, ...] = ()
    """Layers of the sandbox that may be missing, see `mull.evaluation.sandbox.LAYERS`."""

    length: int | None = Field(default=None, ge=2)
    """Tokens of a row of text; default: 512, and for perplexity the model's positions, as in lm-eval."""

    def route(self) -> Route:
        """Which layers run.

        Raises:
            ValueError: layers beside think iterations or adaptive depth.
        """
        if self.layers is None:
            return Route(self.think_iterations, self.adaptive)
        if self.think_iterations is not None or self.adaptive:
            raise ValueError("layers says which layers run, and so do think_iterations and adaptive: give one of them.")
        return Route(path=tuple((visit.layer, visit.occurrence) for visit in from_layers(self.layers)))

    def heads(self) -> MTPConfig | None:
        """Heads that are read from the checkpoint beside those that it was saved with."""
        return None if self.mtp is None else MTPConfig(mtp_head_type=self.mtp)


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated."""

    name: str
    model: Any
    """Of mull, or of transformers."""

    tokenizer: PreTrainedTokenizerBase
    route: Route = OWN_ROUTE

    @property
    def is_mull(self) -> bool:
        """Whether it is a model of mull."""
        return isinstance(self.model, MullForCausalLM)

    @property
    def n_heads(self) -> int:
        """Extra heads."""
        return 0 if not self.is_mull or self.model.mtp_config is None else int(self.model.mtp_config.num_predict_tokens)

    @property
    def positions(self) -> int:
        """Longest text that it reads."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    def reader(self, request: Request, chat: bool | None = None) -> AnswerReader:
        """Texts to tokens and back; `chat` decides over the request's."""
        wanted = request.chat if chat is None else chat
        return AnswerReader(self.tokenizer, bool(self.tokenizer.chat_template) if wanted is None else wanted)

    @functools.cached_property
    def end_tokens(self) -> list[int]:
        """Tokens that end an answer. Nothing else of a checkpoint's generation config changes what a writer writes."""
        stated = self.model.generation_config.eos_token_id if self.model.generation_config else None
        return sorted(TextEncoder(self.tokenizer).ends(stated))

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """Of all that makes the model what it is, so that no run goes on with another one under the same name."""
        return {
            "weights": weights_digest(self.model),
            "config": config_digest(self.model.config),
            "tokenizer": tokenizer_digest(self.tokenizer),
        }

    @property
    def generation(self) -> str | None:
        """A hash of the generation config, all of which ``generate`` obeys as lm-eval calls it."""
        stated = self.model.generation_config
        return None if stated is None else _digest(stated.to_dict())

    def writer(self, request: Request) -> Writer:
        """What continues prompts."""
        ends = self.end_tokens
        if not self.is_mull or request.engine == "transformers":
            if request.engine == "mull":
                raise ValueError(f"mull has no models like {self.name}: leave engine out, and transformers writes.")
            return PlainWriter(self.model, ends, self.route)
        return MullWriter(self.model, ends, self.route, self.drafts(request))

    def drafts(self, request: Request) -> int:
        """Drafts per round."""
        if not self.is_mull or request.engine == "transformers":
            return 0
        return min(1, self.n_heads) if request.draft_length is None else request.draft_length

    def facts(self, request: Request) -> dict[str, Any]:
        """What results depend on besides the suite's own settings."""
        own = self.is_mull and request.engine != "transformers"
        return {
            "model": self.name,
            **self.hashes,
            "end_tokens": self.end_tokens,
            "engine": "mull" if own else "transformers",
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "etd": None if request.etd is None else request.etd.model_dump(mode="json", exclude_defaults=True),
            "mtp": request.mtp,
            "think_iterations": request.think_iterations,
            "adaptive": request.adaptive,
            "path": None if request.layers is None else list(request.layers),
            "draft_length": self.drafts(request),
        }


def load_subject(name: str, request: Request, device: torch.device) -> Subject:
    """Load a model and its tokenizer: by mull, or by transformers where mull does not have the architecture.

    Raises:
        OSError: no checkpoint there.
        ValueError: routes that the model cannot run, or as in `mull.retrofit.wrap.from_pretrained`.
    """
    source = find_source(name)
    config = load_config(source, {})
    options: dict[str, Any] = {} if request.dtype is None else {"dtype": DTYPES[request.dtype]}
    route = request.route()
    if _has_family(config):
        model: Any = from_pretrained(name, etd=request.etd, mtp=request.heads(), allow_missing=False, **options)
    elif given := [*route.options(), *(name for name in ("etd", "mtp") if getattr(request, name) is not None)]:
        raise ValueError(f"{', '.join(given)} is for models of mull, and it has none like {name}: leave it out.")
    else:
        with explained(name, weights=True):
            model = AutoModelForCausalLM.from_pretrained(source.name, **NO_CODE, **source.options, **options).eval()
    tokenizer = load_tokenizer(name)
    known = model.get_output_embeddings().weight.shape[0]
    if len(tokenizer) > known:
        raise ValueError(f"The tokenizer has {len(tokenizer)} tokens, the model {known}: it belongs to another model.")
    subject = Subject(name, model.to(device).eval(), tokenizer, route)
    if route.options():
        with torch.no_grad():  # what it cannot run is told now, not hours later
            subject.model(torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False, **route.options())
    return subject


def _has_family(config: PreTrainedConfig) -> bool:
    if isinstance(config, MullConfig):
        return True
    try:
        require_supported(config.get_text_config())
    except ValueError:
        return False
    return True


def weights_digest(model: torch.nn.Module) -> str:
    """A hash of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        for part in tensor.detach().reshape(-1).split(HASHED_AT_ONCE):
            digest.update(part.contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()[:16]


def config_digest(config: PreTrainedConfig) -> str:
    """A hash of a configuration as it was loaded: the defaults of this version of transformers are part of it."""
    return _digest(json.loads(config.to_json_string(use_diff=False)))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the files that the tokenizer saves, its chat templates among them."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = file.read_bytes()
            if file.name in NO_TEXT:
                kept = {name: value for name, value in json.loads(content).items() if name not in NO_TEXT[file.name]}
                content = json.dumps(kept, sort_keys=True).encode()
            digest.update(f"{file.relative_to(folder)} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_settings(fields), sort_keys=True, default=str).encode()).hexdigest()[:16]


def _settings(value: Any) -> Any:
    """Without `NO_SETTINGS`, at any depth: configurations hold configurations."""
    if isinstance(value, Mapping):
        return {name: _settings(each) for name, each in value.items() if name not in NO_SETTINGS}
    return [_settings(each) for each in value] if isinstance(value, list | tuple) else value
