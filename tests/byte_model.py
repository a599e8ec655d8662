"""A small Hugging Face folder of a random model with a tokenizer of single bytes, for tests that read text."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.families import FAMILY_CONFIGS, VOCABULARY, hf_model


def save_byte_model(folder: Path, positions: int = 64) -> Path:
    """Llama of odd sizes with so many positions; returns the folder."""
    hf_model({**FAMILY_CONFIGS["llama"], "max_position_embeddings": positions}).save_pretrained(
        folder
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 3]
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
