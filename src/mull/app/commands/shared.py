"""What several commands read."""

import os
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from typer import Argument, Option

from mull.data.corpus import load_stdlib
from mull.data.packing import PackedDataset, pack_texts
from mull.data.sources import Document, load_documents
from mull.model.configs import ETDConfig
from mull.retrofit.source import load_tokenizer
from mull.retrofit.wrap import from_pretrained
from mull.runtime.distributed import device

ModelArgument = Annotated[str, Argument(help="Folder, .gguf file or hub name of a checkpoint.", metavar="MODEL")]

SplitOption = Annotated[str | None, Option(help="Encoder, think and decoder layers of a base checkpoint: 7,4,5.")]


def parse_split(text: str) -> ETDConfig:
    """What was written for --etd."""
    counts = text.split(",")
    if len(counts) != 3 or not all(count.strip().isdigit() for count in counts):
        raise ValueError(f"--etd {text} must be three numbers of layers, such as 7,4,5.")
    encoder, think, decoder = map(int, counts)
    return ETDConfig(n_encoder_layers=encoder, n_think_layers=think, n_decoder_layers=decoder)


def print_once(text: str) -> None:
    """Print on rank 0 only; torchrun sets RANK."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def held_out(data: list[str] | None) -> Sequence[Document]:
    """Text to measure a model on. It is read before the model, so that a wrong path is told at once."""
    return load_stdlib().held_out if data is None else load_documents(data)


def rows_of(documents: Sequence[Document], name: str, model: Any, length: int) -> PackedDataset:
    """The text in tokens of the model that has this name."""
    config = model.config.get_text_config()
    if length > config.max_position_embeddings:
        raise ValueError(
            f"--length {length} exceeds the model's {config.max_position_embeddings} positions: measure shorter rows."
        )
    texts = (document.text for document in documents)
    return pack_texts(texts, load_tokenizer(name), length=length, vocab_size=config.vocab_size)


def teacher(name: str) -> Any:
    """A model to measure: in fp32 on a CPU, where bf16 is slow."""
    dtype: dict[str, Any] = {"dtype": torch.float32} if device().type == "cpu" else {}
    model: Any = from_pretrained(name, allow_missing=False, **dtype)
    return model.to(device())


def print_table(rows: Sequence[Sequence[Any]]) -> None:
    """Cells in columns, each as wide as its longest cell."""
    cells = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print(*(cell.rjust(width) for cell, width in zip(row, widths, strict=True)), sep="  ")
