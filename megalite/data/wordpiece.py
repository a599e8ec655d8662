"""Trains a WordPiece tokenizer for encoders as in BERT (arXiv 1810.04805), with [PAD], [UNK], [CLS], [SEP], [MASK]."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from megalite.data.documents import read_texts
from megalite.data.tokenizer import new_folder
from megalite.data.tokenizer_training import check_some_text
from megalite.errors import DataError

SPECIAL = {
    "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"
}  # fmt: skip


def train_wordpiece(
    inputs: Sequence[str],
    vocab_size: int,
    output: str | Path,
    text_key: str = "text",
    lowercase: bool = False,
) -> None:
    """Trains on the documents of `inputs` and writes the folder `output`, which transformers and megalite load; special
    tokens have the first ids. Raises DataError if the output exists, an input cannot be read, or the text does not give
    a vocabulary of that size."""
    from transformers import PreTrainedTokenizerFast  # takes seconds to import

    with new_folder(Path(output)) as folder:
        check_some_text(inputs, text_key)
        tokenizer = _trained(read_texts(inputs, text_key), vocab_size, lowercase)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)


def _trained(texts: Iterable[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL.values()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (size := tokenizer.get_vocab_size()) != vocab_size:
        limit = "at most" if size < vocab_size else "at least"
        raise DataError(f"--vocab-size: {vocab_size}: must be {limit} {size} for this text")
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends
    )
    return tokenizer
