"""Train a WordPiece tokenizer for encoders, as BERT has (arXiv 1810.04805), with [PAD], [UNK], [CLS], [SEP], [MASK]."""

import os
import tempfile
from collections.abc import Sequence
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
    """Train on the documents of `inputs` and write the folder `output`, which transformers and megalite load; special
    tokens have the first ids. Raises DataError for an output that exists, an input that cannot be read, or a vocabulary
    that the text cannot fill."""
    from transformers import PreTrainedTokenizerFast  # seconds to import

    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output}: already exists; choose a new folder or remove it")
    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
    )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL.values()), show_progress=False
    )
    tokenizer.train_from_iterator(read_texts(inputs, text_key), trainer)
    if (size := tokenizer.get_vocab_size()) != vocab_size:
        rule = (
            f"the text makes {size} tokens"
            if size < vocab_size
            else f"its characters alone make {size} tokens"
        )
        raise DataError(f"--vocab-size {vocab_size}: {rule}")
    ends = [
        (token, tokenizer.token_to_id(token))
        for token in (SPECIAL["cls_token"], SPECIAL["sep_token"])
    ]
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        folder = Path(scratch) / "folder"
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
        os.chmod(folder, 0o755)
        if output.is_dir():
            output.rmdir()
        os.replace(folder, output)
