"""Train a small byte-level BPE tokenizer."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
N_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary from documents.

    All 256 bytes are tokens, so any text is encoded without unknown tokens and decoded exactly. Equal texts give equal
    vocabularies.

    Args:
        texts: Documents to count pairs in.
        vocab_size: Upper limit of the vocabulary, including the 256 bytes and ``<|endoftext|>``. A small corpus may have too few
            pairs to reach it, so take a model's vocabulary from ``len(tokenizer)``.

    Returns:
        A tokenizer that adds no special tokens unless asked. ``<|endoftext|>`` is token 0, both ``eos_token`` and ``pad_token``.

    Raises:
        ValueError: `vocab_size` is too small for the bytes and ``<|endoftext|>``.

    Source:
        Byte-level BPE of GPT-2, as the tokenizers library implements it.
    """
    if vocab_size < N_BYTES + 1:
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {N_BYTES + 1}, for {N_BYTES} bytes and {END_OF_TEXT}."
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)
