"""The section ``data`` of a recipe: what a stage is trained on."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from mull.data.arithmetic import MAX_DIGITS, OPERATIONS, ArithmeticTask
from mull.runtime.arguments import Frozen


class Section(Frozen):
    """A part of a recipe."""


READ_FROM_FILES = ("paths", "key", "split", "config", "held_out_paths", "held_out_split", "max_bytes")
"""Keys of the data that generated data does not read."""


class ArithmeticSection(Section):
    """Generated questions such as ``12*34=`` and their answers, see `mull.data.arithmetic`."""

    digits: int = Field(default=2, ge=1, le=MAX_DIGITS)
    """Digits of the largest operand."""

    operations: str = OPERATIONS
    """Some of ``+``, ``-`` and ``*``."""

    questions: int = Field(default=10_000, ge=1, le=1_000_000)
    """Questions with answers to train on; ``grpo-wmtp`` asks new ones in every step."""

    @field_validator("operations")
    @classmethod
    def _check_operations(cls, operations: str) -> str:
        ArithmeticTask(operations=operations)
        return operations


class ProgramsSection(Section):
    """Tasks whose answers are programs, see `mull.data.programs`: those of ``paths``, or generated ones."""

    prompt: Literal["mbpp", "chat"] = "mbpp"
    """How tasks of ``paths`` are asked: as in MBPP's paper, or in a message of the tokenizer's chat template."""

    demonstrations: int = Field(default=10_000, ge=1, le=1_000_000)
    """Generated tasks with programs to train on; ``grpo-wmtp`` asks for programs instead."""

    wrong: float = Field(default=0.0, ge=0, le=1)
    """Share of demonstrations whose program is wrong, by one in a number."""


class DataSection(Section):
    """What it is trained on."""

    paths: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Files, folders, URLs (``s3://…``) and datasets (``hf:…``), see `mull.data.sources`; without them, the sources of the
    Python standard library."""

    format: Literal["text", "mbpp", "humaneval", "code_contests", "examples", "arithmetic", "programs", "routes"] = (
        "text"
    )
    """``text``; a schema of tasks with answers, see `mull.data.tasks`, of which only right answers are trained on, and prompts
    are not; ``arithmetic``, which is generated and written in characters; ``programs``, tasks in MBPP's form whose answers are
    run, or without `paths` generated ones; or ``routes``, files of ``mull routes``."""

    key: str = "text"
    """Where a record has its text; read with ``text``."""

    split: str | None = None
    """Split of the datasets among `paths`; for ``mbpp`` one of its own, such as ``train``."""

    config: str | None = None
    """Configuration of the datasets among `paths`."""

    held_out_paths: tuple[str, ...] | None = Field(default=None, min_length=1)
    """The same as `paths` for evaluation. The standard library brings its own held-out files."""

    held_out_split: str | None = None
    """Split for evaluation, of `held_out_paths` or else of `paths`."""

    arithmetic: ArithmeticSection | None = None
    """Which questions ``arithmetic`` asks."""

    programs: ProgramsSection | None = None
    """Details of ``programs``."""

    max_bytes: int | None = Field(default=None, ge=1)
    """Train on a random sample of the texts, at most this large."""

    vocab_size: int = Field(default=2048, ge=257, le=1_000_000)
    """Size of the byte-level BPE that is trained when the model starts from random weights."""

    length: int = Field(default=256, ge=2)
    """Tokens per row; documents are packed."""

    batch_size: int = Field(default=8, ge=1, le=100_000)
    """Rows per micro-batch."""

    @property
    def generated(self) -> bool:
        """Whether it is read from no files."""
        return self.format == "arithmetic" or (self.format == "programs" and self.paths is None)

    @model_validator(mode="after")
    def _check_programs(self) -> Self:
        if self.programs is None:
            return self
        if self.format != "programs":
            raise ValueError(f"the section programs belongs to format=programs, but format={self.format}: leave it out")
        unread = {"prompt"} if self.paths is None else {"demonstrations", "wrong"}
        if unread := unread & self.programs.model_fields_set:
            kind = "generated tasks" if self.paths is None else "tasks that are read from paths"
            raise ValueError(f"programs.{min(unread)} is not read for {kind}: leave it out")
        return self

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        if (self.format == "arithmetic") != (self.arithmetic is not None):
            raise ValueError(
                f"format={self.format} with arithmetic={self.arithmetic}: format arithmetic needs it, others do not"
            )
        given = {name for name in READ_FROM_FILES if name in self.model_fields_set}
        if self.generated and given:
            raise ValueError(
                f"format={self.format} is generated and reads no {', '.join(sorted(given))}: leave them out"
                + (", or give paths" if self.format == "programs" else "")
            )
        if self.format != "text" and not self.generated:
            if self.paths is None:
                raise ValueError(f"format={self.format} needs paths: the standard library holds texts only")
            if unread := sorted(given & {"key", "max_bytes"}):
                raise ValueError(
                    f"{' and '.join(unread)} are for texts, and format={self.format} reads tasks: leave them out"
                )
            if self.format == "routes" and (unread := sorted(given & {"split", "config", "held_out_split"})):
                raise ValueError(f"{' and '.join(unread)} are for datasets, and routes are files: leave them out")
        if self.held_out_split is not None and self.held_out_paths is None:
            if self.paths is None:
                raise ValueError("held_out_split needs paths or held_out_paths that have splits")
            if self.held_out_split == self.split:
                raise ValueError(f"held_out_split={self.held_out_split!r} is what is trained on: choose another split")
        return self
