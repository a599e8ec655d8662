"""RoBERTa (arXiv 1907.11692): BERT whose positions begin after the padding token's id and do not count padding."""

import re
from dataclasses import replace
from typing import Any

from megalite.errors import ConfigError
from megalite.model.families import bert
from megalite.model.families.common import KEY, HFTensor, tensors, written
from megalite.model.families.family import Family
from megalite.model.spec import TransformerSpec

TENSORS = (
    bert.encoder_tensors("roberta")
    | tensors(
        {"head.transform.dense": "lm_head.dense", "head.transform.norm": "lm_head.layer_norm"}
    )
    | {"head.weight": HFTensor("lm_head.decoder.weight"), "head.bias": HFTensor("lm_head.bias")}
)
_UNUSED = re.compile(
    r"^(roberta\.pooler\.|roberta\.embeddings\.position_ids$|lm_head\.decoder\.bias$)"
)


def read(config: Any) -> TransformerSpec:
    """A RobertaConfig as our spec."""
    pad, rows = config.pad_token_id, config.max_position_embeddings
    if isinstance(pad, bool) or not isinstance(pad, int) or pad < 0:
        rule = "must be a token id: positions begin after it"
        raise ConfigError(f"{KEY}.pad_token_id: {written(pad)}: {rule}")
    if rows < pad + 2:
        rule = f"must be at least {pad + 2}: positions begin after pad_token_id {pad}"
        raise ConfigError(f"{KEY}.max_position_embeddings: {rows}: {rule}")
    spec = bert.encoder(config)
    # Its head always uses GELU, regardless of hidden_act.
    return replace(
        spec, max_positions=rows - pad - 1, position_offset=pad + 1, head_transform="gelu"
    )


FAMILY = Family(read, TENSORS, unused=_UNUSED)
