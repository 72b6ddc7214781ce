"""Train a small byte-level BPE tokenizer on the documents at hand."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
N_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary.

    All 256 bytes are tokens, so that any text is encoded without an unknown token and decoded to itself. Equal texts
    give an equal vocabulary.

    Args:
        texts: Documents to count pairs in.
        vocab_size: Upper bound of the vocabulary, the 256 bytes and ``<|endoftext|>`` included. Few or short
            documents may not hold enough pairs to reach it, hence size a model with ``len(tokenizer)``.

    Returns:
        A tokenizer that adds no special tokens by itself; ``<|endoftext|>`` is token 0, separates documents
        (``eos_token``) and fills rows (``pad_token``).

    Raises:
        ValueError: `vocab_size` does not hold the bytes and ``<|endoftext|>``.

    Source:
        Byte-level BPE of GPT-2, as the tokenizers library implements it.
    """
    if vocab_size < N_BYTES + 1:
        raise ValueError(f"vocab_size={vocab_size} must be at least {N_BYTES + 1}: {N_BYTES} bytes and {END_OF_TEXT}.")
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
