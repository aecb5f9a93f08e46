"""Released CogView files, both ways: the tokenizer's `.pt`, and the folders of the transformers.

    tokenizer.pt                              state dict, keys with or without `module.`
    FOLDER/latest_checkpointed_iteration.txt  names the sub-folder
    FOLDER/ITERATION/mp_rank_00_model_states.pt   and further ranks of a model-parallel run

Tensors have the shapes of ours; only names differ, and `_TRANSFORMER` and `_VQVAE` are the whole of that difference.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview_pl.checkpoints.pickles import read_pt
from cogview_pl.checkpoints.store import build_vqvae
from cogview_pl.durable import replacing, write_text
from cogview_pl.errors import UserError
from cogview_pl.transformer import Transformer
from cogview_pl.vqvae import VQVAE

MEAN = (0.79093, 0.76271, 0.75340)
"""Normalisation of the released tokenizer per channel, on the scale 0 black … 1 white."""
STD = (0.30379, 0.32279, 0.32800)

_NUM_HEADS = {(48, 2560): 40, (12, 1024): 16}
"""Heads of the known sizes (layers, width); the files do not say."""

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
_VQVAE = {
    **{f"encoder.{layer}": f"enc_b.blocks.{layer}" for layer in (0, 2, 4, 6)},
    **{f"decoder.{layer}": f"dec.blocks.{layer}" for layer in (0, 2, 4, 6)},
    "quantizer.codebook": "quantize_t.embed",
    "quantizer.cluster_size": "quantize_t.cluster_size",
    "quantizer.embed_avg": "quantize_t.embed_avg",
}
_NOT_IN_FILES = {"mean", "std", "quantizer.initialised", "quantizer.updates", "quantizer.revived_total"}

_LATEST = "latest_checkpointed_iteration.txt"
_RANK_FILE = "mp_rank_{:02d}_model_states.pt"


def is_released(path: str | Path) -> bool:
    """Whether a path looks like a released file or folder rather than one of our runs."""
    path = Path(path)
    return path.suffix in (".pt", ".pth") or (path / _LATEST).is_file() or (path / _RANK_FILE.format(0)).is_file()


def is_vqvae_file(file: str | Path, key: str) -> bool:
    """Whether a `.pt` file holds the image tokenizer, judged by its names; raises UserError if it cannot be read."""
    return any("quantize_t." in str(name) for name in read_pt(Path(file), key))


def load_vqvae(path: str | Path, key: str = "image_tokenizer.path") -> VQVAE:
    """The image tokenizer in a released `.pt` file, in evaluation mode, float32.

    Width, code dimension and number of codes follow from the shapes. `encode` and `decode` take and give pictures on
    the scale 0 … 1; the released normalisation is inside.

    Raises:
        UserError: the file cannot be read, or its tensors are not those of a released tokenizer.
    """
    state = _renamed(_without_prefix(_tensors(read_pt(Path(path), key), path, key)), _inverse(_VQVAE), path, key)
    _require_keys(state, {name for ours in _VQVAE for name in _with_kinds(ours)}, _VQVAE, path, key)
    code_dim, num_codes = state["quantizer.codebook"].shape
    model = build_vqvae(released_settings(len(state["encoder.0.bias"]), code_dim, num_codes))
    kept = {name: tensor for name, tensor in model.state_dict().items() if name in _NOT_IN_FILES}
    _load(model, {name: tensor.float() for name, tensor in state.items()} | kept, path, key)
    return model.eval()


def vqvae_settings(model: VQVAE) -> dict[str, Any]:
    """Constructor arguments of a tokenizer that `load_vqvae` returned, as model folders keep them."""
    return released_settings(len(model.state_dict()["encoder.0.bias"]), model.quantizer.code_dim, model.num_codes)


def released_settings(width: int, code_dim: int, num_codes: int) -> dict[str, Any]:
    """Constructor arguments of a tokenizer of the released architecture; the released one is (512, 256, 8192)."""
    return {
        "width": width,
        "code_dim": code_dim,
        "num_codes": num_codes,
        "downsampling": 8,
        "residual_blocks": 0,
        "mean": list(MEAN),
        "std": list(STD),
        "quantizer": {"kind": "ema", "decay": 0.99, "commitment_weight": 0.25, "kmeans_iters": 0},
    }


def save_vqvae(model: VQVAE, path: str | Path) -> None:
    """Write a `.pt` file that the original opens.

    Raises:
        UserError: the model has something that the released architecture lacks.
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
                f"{[round(value, 5) for value in state[name].flatten().tolist()]}; train with image_tokenizer=official"
            )
    codebook = state["quantizer.codebook"]  # quantizers other than EMA have no statistics; only training reads them
    statistics = {"quantizer.cluster_size": torch.ones(codebook.shape[1]), "quantizer.embed_avg": codebook.clone()}
    state = {name: tensor.contiguous() for name, tensor in (statistics | state).items() if name not in _NOT_IN_FILES}
    _require_keys(state, {name for ours in _VQVAE for name in _with_kinds(ours)}, {}, path, "convert")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(path)) as draft, draft.open("wb") as stream:
        torch.save(_renamed(state, _VQVAE, path, "convert"), stream)


def load_transformer(
    path: str | Path,
    *,
    num_heads: int | None = None,
    norm_scope: str = "tensor",
    dtype: torch.dtype = torch.float32,
    key: str = "init_from",
) -> Transformer:
    """The sequence model in a released folder or `.pt` file, in evaluation mode.

    Layers, width, vocabulary and positions follow from the shapes. Weights are mapped from the disk and converted
    one by one, so the host needs room for the model and its largest tensor.

    Args:
        path: the folder with `latest_checkpointed_iteration.txt`, the folder of the ranks, or the file of rank 0;
            the other ranks of a model-parallel checkpoint lie beside it and are merged.
        num_heads: number of attention heads, which the file does not tell; None for the sizes that are known.
        norm_scope: `tensor` computes what the original computes (`compat: official`); `token` is our default, where
            a result does not depend on the rest of the batch.
        dtype: of the weights; the files hold float16.
        key: config key that error messages name.

    Raises:
        UserError: a file is missing, damaged or refused, a tensor is missing, unknown or of the wrong shape, or the
            number of heads is not known.
    """
    state = _merge_ranks([_module(read_pt(file, key), file, key) for file in _rank_files(Path(path), key)], path, key)
    state = _renamed(state, _inverse(_TRANSFORMER), path, key)
    layers = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    _require_keys(state, _transformer_names(layers), _TRANSFORMER, path, key)
    vocabulary_size, width = state["token_embedding.weight"].shape
    with torch.device("meta"):
        model = Transformer(
            vocabulary_size=vocabulary_size,
            num_layers=layers,
            width=width,
            num_heads=_heads(num_heads, layers, width, path, key),
            num_positions=state["position_embedding.weight"].shape[0],
            norm="sandwich",
            norm_scope=norm_scope,
        )
    for name in list(state):
        state[name] = state[name].to(dtype, copy=True)  # a copy: the file must not stay mapped under a training run
    _load(model, state, path, key)
    return model.eval()


def released_names(model: Transformer) -> dict[str, str]:
    """Our name of every tensor of a transformer → its name in released files; raises UserError if one has none."""
    names = list(model.state_dict())
    rename = _renamer(_TRANSFORMER)
    if set(names) != _transformer_names(len(model.blocks)):
        raise UserError("convert: the original knows model.norm=sandwich only; this model has another norm")
    return {name: str(rename(name)) for name in names}


def save_transformer(model: Transformer, path: str | Path, *, iteration: int = 1) -> None:
    """Write a folder that the original opens: `PATH/ITERATION/mp_rank_00_model_states.pt` and the file that names it.

    Tensors are float16, as in released files, where that loses nothing; otherwise they keep their precision.

    Raises:
        UserError: the model has not the released architecture (Sandwich-LN).
    """
    names = released_names(model)
    state = {names[ours]: tensor.detach().cpu().contiguous() for ours, tensor in model.state_dict().items()}
    if all(torch.equal(tensor.half().to(tensor.dtype), tensor) for tensor in state.values()):
        state = {name: tensor.half() for name, tensor in state.items()}
    folder = Path(path) / str(iteration)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / _RANK_FILE.format(0)) as draft, draft.open("wb") as stream:
        torch.save({"module": state, "iteration": iteration}, stream)
    write_text(Path(path) / _LATEST, str(iteration))


def _rank_files(path: Path, key: str) -> list[Path]:
    """The files of all ranks, in order."""
    if path.is_file():
        folder, first = path.parent, path
    else:
        folder = _iteration_folder(path, key)
        first = folder / _RANK_FILE.format(0)
    if first.name != _RANK_FILE.format(0):
        return [first]
    ranks = [first]
    while (following := folder / _RANK_FILE.format(len(ranks))).is_file():
        ranks.append(following)
    return ranks


def _iteration_folder(path: Path, key: str) -> Path:
    if (path / _RANK_FILE.format(0)).is_file():
        return path
    latest = path / _LATEST
    if not latest.is_file():
        raise UserError(f"{key}={path}: no {_LATEST} and no {_RANK_FILE.format(0)} there; give the unpacked folder")
    name = latest.read_text(encoding="utf-8", errors="replace").strip()
    names = [name, "0"] if name == "release" else [name]  # the original's two loaders read one each
    for candidate in names:
        if re.fullmatch(r"\w+", candidate) and (path / candidate).is_dir():
            return path / candidate
    raise UserError(f"{latest} names {name[:40]!r}, and there is no such folder beside it; unpack the archive again")


def _module(found: Mapping[str, object], file: Path, key: str) -> dict[str, Tensor]:
    module = found.get("module", found)
    if not isinstance(module, Mapping):
        raise UserError(f"{key}: {file}: entry 'module' is a {type(module).__name__}, not a dictionary of weights")
    return _without_prefix(_tensors(module, file, key))


def _tensors(found: Mapping[str, object], path: str | Path, key: str) -> dict[str, Tensor]:
    strangers = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    if strangers or not found:
        raise UserError(
            f"{key}: {path} is no dictionary of weights: {_listed(strangers) or 'it is empty'}; give a released file"
        )
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if next(iter(state)).startswith("module."):
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


# What a rank of a model-parallel run holds of a tensor: a slice along this dimension; of tensors that are not listed,
# all of it. The fused projection is sliced within each of its thirds.
_SLICED = {
    "word_embeddings.weight": 0,
    "mlp.dense_h_to_4h.weight": 0,
    "mlp.dense_h_to_4h.bias": 0,
    "attention.dense.weight": 1,
    "mlp.dense_4h_to_h.weight": 1,
}
_SLICED_BY_THIRDS = ("query_key_value.weight", "query_key_value.bias")


def _merge_ranks(ranks: list[dict[str, Tensor]], path: str | Path, key: str) -> dict[str, Tensor]:
    if len(ranks) == 1:
        return ranks[0]
    if any(set(rank) != set(ranks[0]) for rank in ranks):
        raise UserError(f"{key}={path}: the {len(ranks)} ranks hold different tensors; they are of different runs")
    return {name: _merge(name, [rank[name] for rank in ranks], path, key) for name in ranks[0]}


def _merge(name: str, slices: list[Tensor], path: str | Path, key: str) -> Tensor:
    if name.endswith(_SLICED_BY_THIRDS):
        thirds = zip(*(part.chunk(3) for part in slices), strict=True)
        return torch.cat([torch.cat(third) for third in thirds])
    for suffix, dimension in _SLICED.items():
        if name.endswith(suffix):
            return torch.cat(slices, dimension)
    if not all(torch.equal(slices[0], other) for other in slices[1:]):
        raise UserError(f"{key}={path}: the ranks disagree on {name}; they are of different runs")
    return slices[0]


def _heads(given: int | None, layers: int, width: int, path: str | Path, key: str) -> int:
    heads = given or _NUM_HEADS.get((layers, width))
    if heads is None:
        raise UserError(
            f"{key}={path} has {layers} layers of width {width}; the file does not tell the number of attention heads: "
            "set model.num_heads (num_heads= in Python)"
        )
    if width % heads:
        raise UserError(f"{key}={path}: width {width} is no multiple of num_heads={heads}; set model.num_heads")
    return heads


def _transformer_names(layers: int) -> set[str]:
    return {
        name for ours in _TRANSFORMER for layer in range(layers) for name in _with_kinds(ours.replace("{}", str(layer)))
    }


def _with_kinds(ours: str) -> tuple[str, ...]:
    """Names of the tensors of one part: tables have a weight only, codebook buffers no kind at all."""
    if ours.startswith("quantizer."):
        return (ours,)
    return (f"{ours}.weight",) if ours.endswith("embedding") else (f"{ours}.weight", f"{ours}.bias")


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}


def _renamed(state: Mapping[str, Tensor], table: Mapping[str, str], path: str | Path, key: str) -> dict[str, Tensor]:
    """The state under the names on the right of the table; raises UserError listing names that it lacks."""
    rename = _renamer(table)
    renamed = {name: rename(name) for name in state}
    if unknown := [name for name, new in renamed.items() if new is None]:
        raise UserError(f"{key}: {path} holds tensors that a released model has not: {_listed(unknown)}")
    return {str(renamed[name]): tensor for name, tensor in state.items()}


def _renamer(table: Mapping[str, str]) -> Callable[[str], str | None]:
    patterns = [
        (re.compile(re.escape(source).replace(r"\{\}", r"(\d+)") + r"(\.weight|\.bias)?"), target)
        for source, target in table.items()
    ]

    def rename(name: str) -> str | None:
        for pattern, target in patterns:
            if match := pattern.fullmatch(name):
                *layer, kind = match.groups()
                return target.format(*layer) + (kind or "")
        return None

    return rename


def _require_keys(
    state: Mapping[str, Tensor], wanted: set[str], table: Mapping[str, str], path: str | Path, key: str
) -> None:
    rename = _renamer(table)
    if missing := sorted(wanted - set(state)):
        raise UserError(f"{key}: {path} lacks {_listed([rename(name) or name for name in missing])}")
    if unknown := sorted(set(state) - wanted):
        raise UserError(f"{key}: {path} holds tensors that do not belong there: {_listed(unknown)}")


def _listed(names: Iterable[str], limit: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _load(model: torch.nn.Module, state: dict[str, Tensor], path: str | Path, key: str) -> None:
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{key}: {path} does not have the shapes of a released model: {reason}") from error
