"""A small Hugging Face folder with a random model and a byte tokenizer, for tests that read text."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from tests.families import FAMILY_CONFIGS, VOCABULARY, hf_model

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def save_byte_model(folder: Path, positions: int = 64) -> Path:
    """Saves a Llama with odd sizes and `positions` positions; returns the folder."""
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


def save_chatty_model(folder: Path) -> Path:
    """Saves the same model with a chat template."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(save_byte_model(folder))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def reference(folder: Path, text: str, new: int) -> str:
    """The text that transformers generates greedily."""
    logging.disable_progress_bar()  # it writes to standard error, which tests compare
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer(
        text, return_tensors="pt", return_token_type_ids=False, add_special_tokens=False
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    whole = model.generate(**ids, max_new_tokens=new, do_sample=False, pad_token_id=0)[0]
    return tokenizer.decode(whole[ids["input_ids"].shape[1] :], skip_special_tokens=True)
