"""Hugging Face folders read under megalite's names, whole and by boxes, and all errors in them."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalite.errors import CheckpointError, UserError
from megalite.hub.hf_folder import HFFolder
from megalite.hub.import_folder import import_hf
from megalite.hub.names import bias_names
from tests.families import FAMILY_CONFIGS, hf_model
from tests.hf_tensors import from_hf


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_any_box_of_any_tensor_is_its_part_of_the_whole(name: str, tmp_path: Path) -> None:
    hf_model(FAMILY_CONFIGS[name]).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    folder = HFFolder(tmp_path)
    stored = {
        key: value
        for file in tmp_path.glob("*.safetensors")
        for key, value in load_file(file).items()
    }
    fused = {re.sub(r"experts\.\d+", "experts", key) for key in stored}  # megalite stacks experts
    fused -= set(bias_names(folder.spec))  # part of the state
    assert len(folder.names) == len(set(folder.names)) >= len(fused)
    for ours in folder.names:
        full = from_hf(folder.spec, ours, stored.__getitem__)
        assert torch.equal(folder.read(ours), full) and folder.shape(ours) == tuple(full.shape)
        offsets = tuple(n // 3 for n in full.shape)
        shape = tuple(max(1, n // 2) for n in full.shape)
        box = full[tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))]
        assert torch.equal(folder.read(ours, offsets, shape), box), ours


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    hf_model(FAMILY_CONFIGS["gpt2"]).save_pretrained(folder)
    return folder


def altered(source: Path, target: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, target / "model.safetensors")
    return target


def test_forms_that_transformers_reads_too(gpt2_folder: Path, tmp_path: Path) -> None:
    """torch's file format, names without the base model's prefix, computed buffers, a saved tied head."""
    wanted = HFFolder(gpt2_folder)
    torch_files = tmp_path / "bin"
    shutil.copytree(gpt2_folder, torch_files)
    torch.save(load_file(torch_files / "model.safetensors"), torch_files / "pytorch_model.bin")
    (torch_files / "model.safetensors").unlink()

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        bare = {key.removeprefix("transformer."): value for key, value in tensors.items()}
        head = tensors["transformer.wte.weight"].clone()
        return bare | {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "lm_head.weight": head}

    for folder in (torch_files, altered(gpt2_folder, tmp_path / "bare", change)):
        for name in wanted.names:
            assert torch.equal(HFFolder(folder).read(name), wanted.read(name))


def test_bert_s_own_files_are_read(tmp_path: Path) -> None:
    """With a pooler, a next-sentence head, the tied head, a buffer, and TensorFlow's names for norms."""
    from transformers import AutoConfig, BertForPreTraining

    model = BertForPreTraining(AutoConfig.for_model(**FAMILY_CONFIGS["bert"]))
    model.save_pretrained(tmp_path / "plain")

    def old(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {
            key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): value
            for key, value in tensors.items()
        }
        words = tensors["bert.embeddings.word_embeddings.weight"]
        head = {"weight": words.clone(), "bias": tensors["cls.predictions.bias"].clone()}
        renamed |= {f"cls.predictions.decoder.{kind}": value for kind, value in head.items()}
        return renamed | {"bert.embeddings.position_ids": torch.arange(16)[None]}

    folder = altered(tmp_path / "plain", tmp_path / "old", old)
    stored = load_file(folder / "model.safetensors")
    assert {"bert.pooler.dense.weight", "cls.seq_relationship.bias"} <= stored.keys()
    norm = stored["bert.encoder.layer.1.output.LayerNorm.beta"]
    assert torch.equal(HFFolder(folder).read("layers.1.mlp_norm.bias"), norm)
    assert import_hf(folder, tmp_path / "checkpoint", verify=True) is not None


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda t: {k: v for k, v in t.items() if "h.1.ln_1.bias" not in k},
            "h.1.ln_1.bias: missing tensor",
        ),
        (
            lambda t: t.update({"transformer.ln_f.weight": torch.ones(35)}),
            "shape [35]: must be [36] according to config.json",
        ),
        (
            lambda t: t.update({"transformer.h.3.ln_1.bias": torch.ones(36)}),
            "h.3.ln_1.bias: unexpected tensor: a gpt2",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(131, 36)}),
            "lm_head.weight: differs from the embedding",
        ),
        (
            lambda t: t.update({"transformer.ln_f.weight": torch.ones(36).int()}),
            "I32: must be one of F64",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    gpt2_folder: Path, tmp_path: Path, change: Any, line: str
) -> None:
    folder = altered(gpt2_folder, tmp_path / "x", change)
    with pytest.raises(CheckpointError) as raised:
        HFFolder(folder)
    assert line in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("name", ["transformer.h.1.attn.c_attn.weight", "transformer.wpe.weight"])
def test_a_weight_that_is_not_finite_is_named(
    gpt2_folder: Path, tmp_path: Path, dtype: torch.dtype, value: float, name: str
) -> None:
    """Also in a position that the comparison of logits does not use, and a value that overflows fp32."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[name][-1, -1] = (
            value if math.isfinite(value) and dtype == torch.float64 else value * math.inf
        )

    folder = altered(gpt2_folder, tmp_path / "x", change)
    with pytest.raises(
        CheckpointError,
        match=f"model.safetensors: {name}: has values from .*: every weight must be finite",
    ):
        import_hf(folder, tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_a_router_bias_that_is_not_finite_is_named_without_the_prefix(tmp_path: Path) -> None:
    """Files of a model that was saved without its head have no prefix."""
    source = tmp_path / "ernie"
    hf_model(FAMILY_CONFIGS["ernie4_5_moe"]).save_pretrained(source)
    (full_name, *_) = bias_names(HFFolder(source).spec)
    name = full_name.removeprefix("model.")

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[full_name][0, 1] = math.nan
        return {key.removeprefix("model."): value for key, value in tensors.items()}

    folder = HFFolder(altered(source, tmp_path / "x", change))
    with pytest.raises(CheckpointError, match=rf"safetensors: {name}: has values from nan"):
        folder.state  # noqa: B018


def test_a_file_that_cannot_be_read_any_more_is_named(gpt2_folder: Path, tmp_path: Path) -> None:
    folder = HFFolder(altered(gpt2_folder, tmp_path / "x", lambda tensors: None))
    (tmp_path / "x" / "model.safetensors").unlink()
    folder._files._open.clear()
    with pytest.raises(CheckpointError, match="model.safetensors: cannot be read: "):
        folder.read("final_norm.weight")


def test_unusable_files_are_named(gpt2_folder: Path, tmp_path: Path, capsys: Any) -> None:
    def broken(name: str, edit: Callable[[Path], Any]) -> str:
        folder = tmp_path / name
        shutil.copytree(gpt2_folder, folder)
        edit(folder)
        with pytest.raises(UserError) as raised:
            HFFolder(folder)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    def pickled(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save({"transformer.wte.weight": Evil()}, folder / "pytorch_model.bin")

    def config(**values: Any) -> Callable[[Path], Any]:
        def edit(folder: Path) -> None:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | values))

        return edit

    def cut(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])

    assert "pytorch_model.bin: must contain only tensors" in broken("pickle", pickled)
    assert "code ran" not in capsys.readouterr().out
    assert "model.safetensors: cannot be read" in broken("cut", cut)
    assert "must contain config.json and safetensors" in broken(
        "none", lambda f: (f / "model.safetensors").unlink()
    )
    index = {"weight_map": {"transformer.wte.weight": "../model.safetensors"}}
    text = json.dumps(index)
    assert "outside its folder" in broken(
        "out", lambda f: (f / "model.safetensors.index.json").write_text(text)
    )
    assert "model_type: 'mamba'" in broken("family", config(model_type="mamba"))
    assert "scale_attn_by_inverse_layer_idx" in broken(
        "field", config(scale_attn_by_inverse_layer_idx=True)
    )


def test_duplicates_in_older_t5_files_must_equal_the_embedding(tmp_path: Path) -> None:
    hf_model(FAMILY_CONFIGS["t5 original"]).save_pretrained(tmp_path)
    path, unread = tmp_path / "model.safetensors", "decoder.block.0.layer.1.EncDecAttention"
    values = load_file(path)
    values |= {
        f"{stack}.embed_tokens.weight": values["shared.weight"].clone()
        for stack in ("encoder", "decoder")
    }
    values[f"{unread}.relative_attention_bias.weight"] = torch.zeros(32, 6)
    save_file(values, path, {"format": "pt"})
    assert "encoder_bias.weight" in HFFolder(tmp_path).names
    values["decoder.embed_tokens.weight"][3, 4] += 1
    save_file(values, path, {"format": "pt"})
    line = "decoder.embed_tokens.weight: differs from the embedding: a t5 model has one embedding"
    with pytest.raises(CheckpointError, match=line):
        HFFolder(tmp_path)


def test_experts_and_biases_without_the_base_model_s_prefix_are_read(tmp_path: Path) -> None:
    """As in a tied model that was saved without its head."""
    config = {**FAMILY_CONFIGS["ernie4_5_moe"], "tie_word_embeddings": True}
    hf_model(config).save_pretrained(tmp_path / "plain")

    def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key.removeprefix("model."): value for key, value in tensors.items()}

    wanted = HFFolder(tmp_path / "plain")
    found = HFFolder(altered(tmp_path / "plain", tmp_path / "bare", bare))
    assert found.state == wanted.state and found.state
    for name in wanted.names:
        assert torch.equal(found.read(name), wanted.read(name))
