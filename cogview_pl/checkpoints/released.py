"""Released CogView files, read and written: the tokenizer's `.pt`, and the folders of the transformers.

    tokenizer.pt                              state dict, keys with or without `module.`
    FOLDER/latest_checkpointed_iteration.txt  names the sub-folder
    FOLDER/ITERATION/mp_rank_00_model_states.pt   and further ranks of a model-parallel run

Tensors have the same shapes as ours; only their names differ (`_TRANSFORMER` and `_VQVAE`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cogview_pl.checkpoints.model_folder import build_vqvae
from cogview_pl.checkpoints.naming import Naming, renamer
from cogview_pl.checkpoints.ranks import LATEST, RANK_FILE, merge_ranks, rank_files, tensors_of, weights_of
from cogview_pl.checkpoints.safe_pickle.load import is_file, read_pt
from cogview_pl.durable.write import replacing, write_text
from cogview_pl.errors import UserError
from cogview_pl.transformer.config import AttentionForm, Norm, NormScope, TransformerConfig
from cogview_pl.transformer.model import Transformer
from cogview_pl.vqvae.config import BUILT_IN
from cogview_pl.vqvae.model import VQVAE

MEAN = (0.79093, 0.76271, 0.75340)
"""Normalisation of the released tokenizer per channel, on the scale 0 black … 1 white."""
STD = (0.30379, 0.32279, 0.32800)

_NUM_HEADS = {(48, 2560): 40, (12, 1024): 16}
"""Heads of the known sizes (layers, hidden size), which the files do not contain."""

_TRANSFORMER = {  # ours → theirs, without .weight and .bias; {} is the layer
    "token_embedding": "word_embeddings",
    "position_embedding": "transformer.position_embeddings",
    "blocks.{}.attention_residual.norm_in": "transformer.layers.{}.input_layernorm",
    "blocks.{}.attention.qkv": "transformer.layers.{}.attention.query_key_value",
    "blocks.{}.attention.out": "transformer.layers.{}.attention.dense",
    "blocks.{}.attention_residual.norm_branch": "transformer.layers.{}.third_layernorm",
    "blocks.{}.mlp_residual.norm_in": "transformer.layers.{}.post_attention_layernorm",
    "blocks.{}.mlp.up": "transformer.layers.{}.mlp.dense_h_to_4h",
    "blocks.{}.mlp.down": "transformer.layers.{}.mlp.dense_4h_to_h",
    "blocks.{}.mlp_residual.norm_branch": "transformer.layers.{}.fourth_layernorm",
    "final_norm": "transformer.final_layernorm",
}
_EMBEDDINGS = "word_embeddings.weight"
_VQVAE = {
    **{f"encoder.{layer}": f"enc_b.blocks.{layer}" for layer in (0, 2, 4, 6)},
    **{f"decoder.{layer}": f"dec.blocks.{layer}" for layer in (0, 2, 4, 6)},
    "quantizer.codebook": "quantize_t.embed",
    "quantizer.cluster_size": "quantize_t.cluster_size",
    "quantizer.embed_avg": "quantize_t.embed_avg",
}
_NOT_IN_FILES = {
    "mean",
    "std",
    "quantizer.initialised",
    "quantizer.updates",
    "quantizer.revived_total",
    "quantizer.temperature",
}


def is_released(path: str | Path) -> bool:
    """Whether a path looks like a released file or folder and not like one of our runs."""
    path = Path(path)
    return path.suffix in (".pt", ".pth") or is_file(path / LATEST) or is_file(path / RANK_FILE.format(0))


def is_vqvae_file(file: str | Path, key: str, *, verify: bool = True) -> bool:
    """Whether a `.pt` file holds the image tokenizer, by the names of its tensors.

    Args:
        verify: compare the checksums of the file; False if the file is loaded next, which compares them anyway.

    Raises:
        UserError: the file cannot be read.
    """
    return is_vqvae_state(read_pt(Path(file), key, verify=verify))


def is_vqvae_state(found: Mapping[Any, Any]) -> bool:
    """Whether the dictionary in a `.pt` file holds the image tokenizer."""
    return any("quantize_t." in str(name) for name in found)


def is_transformer_state(found: Mapping[Any, Any]) -> bool:
    """Whether the dictionary in a `.pt` file holds a transformer, in its entry `module` or at the top."""
    module = found.get("module", found)
    return isinstance(module, Mapping) and any(str(name).endswith(_EMBEDDINGS) for name in module)


def load_vqvae(path: str | Path, key: str = "image_tokenizer.path", *, verify: bool = True) -> VQVAE:
    """The image tokenizer in a released `.pt` file, in evaluation mode, float32.

    hidden_size, codebook_dim and codebook_size follow from the shapes. Images have the scale 0 … 1; the model holds the
    released normalisation.

    Args:
        path: the file.
        key: config key that error messages name.
        verify: compare checksums, and refuse weights that are not finite.

    Raises:
        UserError: the file cannot be read, is damaged, or its tensors are not those of a released tokenizer.
    """
    names = Naming(_VQVAE, path, key)
    state = names.ours(tensors_of(read_pt(Path(path), key, verify=verify), path, key))
    names.require_names(state, {name for ours in _VQVAE for name in _with_kinds(ours)})
    (hidden_size,) = names.sizes(state, "encoder.0.bias", 1)
    codebook_dim, codebook_size = names.sizes(state, "quantizer.codebook", 2)
    settings = released_settings(hidden_size, codebook_dim, codebook_size)
    names.require_shapes(state, lambda: build_vqvae(settings))
    if verify:
        names.require_finite(state)
    model = build_vqvae(settings)
    kept = {name: tensor for name, tensor in model.state_dict().items() if name in _NOT_IN_FILES}
    model.load_state_dict(state | kept)  # copies, so that the file does not stay mapped during a run
    return model.eval()


def vqvae_settings(model: VQVAE) -> dict[str, Any]:
    """Settings of a tokenizer that `load_vqvae` returned, as in a model folder."""
    return released_settings(
        len(model.state_dict()["encoder.0.bias"]), model.quantizer.codebook_dim, model.codebook_size
    )


def released_settings(hidden_size: int, codebook_dim: int, codebook_size: int) -> dict[str, Any]:
    """Settings of a tokenizer of the released architecture; the released sizes are (512, 256, 8192)."""
    return {
        "hidden_size": hidden_size,
        "codebook_dim": codebook_dim,
        "codebook_size": codebook_size,
        "downsampling": 8,
        "residual_blocks": 0,
        "mean": list(MEAN),
        "std": list(STD),
        "quantizer": {
            "_target_": f"{BUILT_IN}.EMAQuantizer",
            "decay": 0.99,
            "commitment_weight": 0.25,
            "kmeans_iters": 0,
            "dead_threshold": 0.1,
            "revive_every": 20,
        },
    }


def vqvae_settings_of(path: str | Path, key: str = "image_tokenizer.path") -> dict[str, Any]:
    """Settings of the tokenizer in a released `.pt` file, by the shapes in it; raises UserError as `load_vqvae`."""
    names = Naming(_VQVAE, path, key)
    state = names.ours(tensors_of(read_pt(Path(path), key, verify=False), path, key))
    names.require_names(state, {name for ours in _VQVAE for name in _with_kinds(ours)})
    (hidden_size,) = names.sizes(state, "encoder.0.bias", 1)
    return released_settings(hidden_size, *names.sizes(state, "quantizer.codebook", 2))


def save_vqvae(model: VQVAE, path: str | Path) -> None:
    """Write a `.pt` file that the original opens.

    Raises:
        UserError: the model has parts that the released architecture lacks.
    """
    if model.downsampling != 8 or any(name.startswith("decoder.7") for name in model.state_dict()):
        raise UserError(
            "convert: the released tokenizer has image_tokenizer.downsampling=8 and residual_blocks=0; this one differs"
        )
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    for name, wanted in (("mean", MEAN), ("std", STD)):
        if not torch.allclose(state[name].flatten(), torch.tensor(wanted)):
            raise UserError(
                f"convert: the original always normalises with {name} {list(wanted)}, this tokenizer was trained with "
                f"{[round(value, 5) for value in state[name].flatten().tolist()]}; train with image_tokenizer=released"
            )
    if "quantizer.project.weight" in state:
        raise UserError(
            "convert: the released tokenizer looks up latents as they are, this one projects them to few dimensions "
            "(image_tokenizer/quantizer=cosine and fsq); train with another quantizer"
        )
    if "quantizer.embed_avg" not in state:  # only training needs the statistics; these are of a codebook at rest
        codebook = state["quantizer.codebook"]
        state |= {"quantizer.cluster_size": torch.ones(codebook.shape[1]), "quantizer.embed_avg": codebook.clone()}
    state = {name: tensor.contiguous() for name, tensor in state.items() if name not in _NOT_IN_FILES}
    names = Naming(_VQVAE, path, "convert")
    names.require_names(state, {name for ours in _VQVAE for name in _with_kinds(ours)})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(path)) as draft, draft.open("wb") as stream:
        torch.save(names.theirs(state), stream)


def transformer_sizes(path: str | Path, key: str = "init_from") -> dict[str, int]:
    """num_layers, hidden_size, vocab_size and num_positions of a released transformer, by the shapes of its tensors.

    num_heads is among them for the known sizes; the files do not contain it.

    Raises:
        UserError: a file is missing, damaged or refused, or its tensors are not those of a transformer.
    """
    files = rank_files(Path(path), key)
    ranks = [weights_of(read_pt(file, key, verify=False), file, key) for file in files]
    names = Naming(_TRANSFORMER, path, key)
    state = names.ours(ranks[0])
    layers = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    names.require_names(state, _transformer_names(max(layers, 1)))
    rows, hidden_size = names.sizes(state, "token_embedding.weight", 2)
    num_positions, _ = names.sizes(state, "position_embedding.weight", 2)
    found = {
        "num_layers": layers,
        "hidden_size": hidden_size,
        "vocab_size": rows * len(ranks),  # each rank has an equal part of the table
        "num_positions": num_positions,
    }
    heads = _NUM_HEADS.get((layers, hidden_size))
    return found if heads is None else {**found, "num_heads": heads}


def load_transformer(
    path: str | Path,
    *,
    num_heads: int | None = None,
    norm_scope: NormScope = NormScope.tensor,
    dtype: torch.dtype = torch.float32,
    key: str = "init_from",
    verify: bool = True,
) -> Transformer:
    """The sequence model in a released folder or `.pt` file, in evaluation mode.

    num_layers, hidden_size, vocab_size and num_positions follow from the shapes. Weights are mapped and converted one
    by one, so the host needs memory for the model and its largest tensor.

    Args:
        path: the folder with `latest_checkpointed_iteration.txt`, the folder of the ranks, or the file of rank 0;
            further ranks of a model-parallel checkpoint in the same folder are merged.
        num_heads: number of attention heads, which the file does not contain; None for the known sizes.
        norm_scope: `tensor` computes as the original program does (`compat=official`); with `token`, our default, a
            result does not depend on the rest of the batch.
        dtype: of the weights; the files hold float16.
        key: config key that error messages name.
        verify: compare checksums, and refuse weights that are not finite; each reads the files once.

    Raises:
        UserError: a file is missing, damaged or refused, a tensor is missing, unknown or of the wrong shape, or the
            number of heads is not known.
    """
    files = rank_files(Path(path), key)
    ranks = [weights_of(read_pt(file, key, verify=verify), file, key) for file in files]
    names = Naming(_TRANSFORMER, path, key)
    state = names.ours(merge_ranks(ranks, path, key))
    layers = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    names.require_names(state, _transformer_names(max(layers, 1)))
    vocab_size, hidden_size = names.sizes(state, "token_embedding.weight", 2)
    num_positions, _ = names.sizes(state, "position_embedding.weight", 2)
    heads = _heads(num_heads, layers, hidden_size, path, key)

    config = TransformerConfig(
        num_layers=layers,
        hidden_size=hidden_size,
        num_heads=heads,
        num_positions=num_positions,
        norm=Norm.sandwich,
        norm_scope=norm_scope,
        attention=AttentionForm.fused,
        dropout=0.0,
        init_std=None,
    )

    def build() -> Transformer:
        return Transformer(config, vocab_size=vocab_size)

    names.require_shapes(state, build)
    if verify:
        names.require_finite(state)
    with torch.device("meta"):
        model = build()
    for name in list(state):
        state[name] = state[name].to(dtype, copy=True)  # copies, so that the file does not stay mapped during a run
    model.load_state_dict(state, assign=True)
    return model.eval()


def released_names(model: Transformer) -> dict[str, str]:
    """Our name of every tensor → its name in released files; raises UserError if a tensor has none."""
    names = list(model.state_dict())
    rename = renamer(_TRANSFORMER)
    if set(names) != _transformer_names(len(model.blocks)):
        raise UserError("convert: the original knows model.norm=sandwich only; this model has another norm")
    return {name: str(rename(name)) for name in names}


def save_transformer(model: Transformer, path: str | Path, *, iteration: int = 1) -> None:
    """Write a folder for the original program: `PATH/ITERATION/mp_rank_00_model_states.pt` and the file that names it.

    Tensors are float16, as in released files, if that loses nothing; otherwise they keep their precision.

    Raises:
        UserError: the model does not have the released architecture (Sandwich-LN).
    """
    names = released_names(model)
    state = {names[ours]: tensor.detach().cpu().contiguous() for ours, tensor in model.state_dict().items()}
    if all(torch.equal(tensor.half().to(tensor.dtype), tensor) for tensor in state.values()):
        state = {name: tensor.half() for name, tensor in state.items()}
    folder = Path(path) / str(iteration)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / RANK_FILE.format(0)) as draft, draft.open("wb") as stream:
        torch.save({"module": state, "iteration": iteration}, stream)
    write_text(Path(path) / LATEST, str(iteration))


def _heads(given: int | None, layers: int, hidden_size: int, path: str | Path, key: str) -> int:
    heads = _NUM_HEADS.get((layers, hidden_size)) if given is None else given
    if heads is None:
        raise UserError(
            f"{key}={path} has {layers} layers of size {hidden_size}; the file does not tell the number of heads: "
            "set model.num_heads (num_heads= in Python)"
        )
    if heads < 1 or hidden_size % heads:
        raise UserError(f"{key}={path}: size {hidden_size} is no multiple of num_heads={heads}; set model.num_heads")
    return heads


def _transformer_names(layers: int) -> set[str]:
    return {
        name for ours in _TRANSFORMER for layer in range(layers) for name in _with_kinds(ours.replace("{}", str(layer)))
    }


def _with_kinds(ours: str) -> tuple[str, ...]:
    """Names of the tensors of a part: embeddings have no bias; buffers of the codebook have neither suffix."""
    if ours.startswith("quantizer."):
        return (ours,)
    return (f"{ours}.weight",) if ours.endswith("embedding") else (f"{ours}.weight", f"{ours}.bias")
