"""Samples on disk, one JSON object per line as they come, and the plan that makes a resumed run equal to an uninterrupted one.

The plan is a fixed list of chunks, each one call of the writer. Which samples are in a chunk depends on the suite, the
settings and the batch size, not on the ranks, nor on what a killed run has left. A resumed run writes each incomplete chunk
again as a whole, and keeps what was missing. So on a CPU with the same software, the joined file is the same byte for byte
after any number of kills and on any number of ranks. With another batch size, each sample still draws the same random
numbers, and without drafts the same tokens up to rounding. On a GPU, kernels may round differently in another process.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mull.evaluation.suites.extract import cut, unix
from mull.evaluation.suites.problems import Problems
from mull.evaluation.suites.prompts import PROTOCOLS
from mull.evaluation.suites.writers import AnswerReader, Writer
from mull.ops.sampling import Sampling
from mull.runtime import storage
from mull.runtime.distributed import rank, world_size
from mull.runtime.progress import Progress

JOINED = "samples.jsonl"
PART = "samples-rank{}.jsonl"
PARTS = "samples-rank*.jsonl"


class Key(NamedTuple):
    """One sample."""

    temperature: float
    problem: str
    sample: int


@dataclass(frozen=True)
class SamplePlan:
    """Which samples are drawn, and how."""

    problems: Problems
    prompts: tuple[str, ...]
    """Text before each answer, or the user's message of a chat."""

    temperatures: tuple[float, ...]
    n_samples: int
    """Samples per problem and temperature."""

    batch_size: int
    max_new_tokens: int
    seed: int = 0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if 0.0 in self.temperatures and self.n_samples > 1:
            raise ValueError(
                f"samples={self.n_samples} with temperature=0 would write one answer {self.n_samples} times: give a "
                "temperature, or one sample."
            )

    def keys(self) -> list[Key]:
        """All samples, in the order of the joined file."""
        names = [problem.name for problem in self.problems.problems]
        return [Key(*each) for each in itertools.product(self.temperatures, names, range(self.n_samples))]

    def chunks(self) -> list[list[Key]]:
        """The samples of each call: of one temperature, and at most `batch_size`."""
        found = []
        for _, keys in itertools.groupby(self.keys(), lambda key: key.temperature):
            rest = list(keys)
            found += [rest[start : start + self.batch_size] for start in range(0, len(rest), self.batch_size)]
        return found

    def seed_of(self, key: Key) -> int:
        """Seed of a sample: of its problem and number, the same at every temperature."""
        text = f"{self.seed}/{self.problems.suite}/{key.problem}/{key.sample}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def sampling(self, temperature: float) -> Sampling:
        """How tokens are chosen; greedy decoding has no top-p."""
        if temperature == 0:
            return Sampling(repetition_penalty=self.repetition_penalty)
        return Sampling(
            temperature=temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )


class SampleFolder:
    """The files of one suite's samples: a file per rank while samples are drawn, and one joined file at the end.

    Args:
        folder: Where they are; made if missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[Key, dict[str, Any]]:
        """The samples of all files, without lines that a kill has torn."""
        found: dict[Key, dict[str, Any]] = {}
        for file in [self.folder / JOINED, *sorted(self.folder.glob(PARTS))]:
            for record in read_lines(file, ("prompt", "text", "finish")):
                found.setdefault(key_of(record), record)
        return found

    def join(self, keys: Sequence[Key]) -> list[dict[str, Any]]:
        """Write the joined file, remove those of the ranks, and return its records; on rank 0, when all ranks have finished.

        Raises:
            RuntimeError: samples are missing.
        """
        found = self.read()
        if missing := [key for key in keys if key not in found]:
            raise RuntimeError(
                f"{self.folder} lacks {len(missing)} samples, such as {missing[0]}: run the evaluation again."
            )
        records = [found[key] for key in keys]
        storage.write_text_atomic(str(self.folder / JOINED), "".join(map(line, records)))
        for file in self.folder.glob(PARTS):
            file.unlink()
        return records


def line(record: Mapping[str, Any]) -> str:
    """A record as a line of a file. Text that is no Unicode, which models can write, stays escaped."""
    return json.dumps(record, sort_keys=True) + "\n"


def key_of(record: Mapping[str, Any]) -> Key:
    """Which sample a record is."""
    return Key(float(record["temperature"]), str(record["problem"]), int(record["sample"]))


def read_lines(file: Path, strings: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Records of a file; a last line that a kill has torn is left out, and a missing file has none.

    Args:
        file: Where samples or their verdicts are.
        strings: Keys that must hold a string.

    Raises:
        ValueError: a line before the last is damaged; names it.
    """
    content = file.read_bytes() if file.exists() else b""
    lines = content.split(b"\n")
    # Without its line end, even a line that is JSON may be the beginning of a longer one.
    for number, text in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(text)
            key_of(record)
            for name in strings:
                if not isinstance(record[name], str):
                    raise TypeError(f"{name} is no string")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}, is damaged ({error}): remove the line, and run again.") from None
        yield record


def repair(file: Path) -> None:
    """Cut off a last line that a kill has torn, so that the next one begins on its own."""
    if not file.exists():
        return
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with file.open("r+b") as stream:
            stream.truncate(whole)


def draw_samples(plan: SamplePlan, writer: Writer, reader: AnswerReader, folder: SampleFolder) -> None:
    """Write the samples that are missing: on each rank, every so many-th chunk.

    Every rank must call this, with the same files before it. When all have returned, rank 0 calls `SampleFolder.join`.

    Raises:
        ValueError: a sample that is there answers another prompt, because the source of the problems has changed.
    """
    have = folder.read()
    chunks = [chunk for chunk in plan.chunks() if not all(key in have for key in chunk)]
    chunks = chunks[rank() :: world_size()]
    prompts = dict(zip((problem.name for problem in plan.problems.problems), plan.prompts, strict=True))
    tokens = dict(zip(prompts, reader.prompts(list(prompts.values())), strict=True))
    for key, record in have.items():
        if key.problem in prompts and record.get("prompt") != prompt_digest(prompts[key.problem]):
            raise ValueError(
                f"{folder.folder} has answers to another prompt of {key.problem}: the problems have changed since. Choose "
                "another folder."
            )
    file = folder.folder / PART.format(rank())
    repair(file)
    label = f"{plan.problems.suite}: drawing"
    missing = sum(key not in have for chunk in chunks for key in chunk)
    with Progress(missing, "sample", label=label) as progress, file.open("ab", buffering=0) as stream:
        for chunk in chunks:
            records = _written(plan, chunk, writer, reader, prompts, tokens)
            new = [record for record in records if key_of(record) not in have]
            storage.append(stream, "".join(map(line, new)))
            progress.advance(len(new))


def _written(
    plan: SamplePlan,
    chunk: Sequence[Key],
    writer: Writer,
    reader: AnswerReader,
    prompts: Mapping[str, str],
    tokens: Mapping[str, Sequence[int]],
) -> list[dict[str, Any]]:
    protocol = PROTOCOLS[plan.problems.suite]
    stops = protocol.chat_stops if reader.chat else protocol.stops
    fits = [key for key in chunk if len(tokens[key.problem]) + plan.max_new_tokens <= writer.positions]
    new: list[list[int]] = []
    if fits:
        new = writer.write(
            [tokens[key.problem] for key in fits],
            [plan.seed_of(key) for key in fits],
            plan.sampling(chunk[0].temperature),
            plan.max_new_tokens,
            reader.stop(stops),
        )
    answers = dict(zip(fits, new, strict=True))
    return [_record(plan, key, answers.get(key), reader, prompts, tokens, stops) for key in chunk]


def _record(
    plan: SamplePlan,
    key: Key,
    new: list[int] | None,
    reader: AnswerReader,
    prompts: Mapping[str, str],
    tokens: Mapping[str, Sequence[int]],
    stops: Sequence[str],
) -> dict[str, Any]:
    written = "" if new is None else reader.text(tokens[key.problem], new)
    written = unix(written)
    text = cut(written, stops)
    if new is None:
        finish = "no room"  # the prompt and max_new_tokens exceed the model's positions
    elif len(text) < len(written):
        finish = "stop"
    else:
        finish = "length" if len(new) >= plan.max_new_tokens else "end"
    return {
        **key._asdict(),
        "finish": finish,
        "prompt": prompt_digest(prompts[key.problem]),
        "seed": plan.seed_of(key),
        "text": text,
    }


def prompt_digest(prompt: str) -> str:
    """A hash of the text of a prompt, which its samples carry."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]
