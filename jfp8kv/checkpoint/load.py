"""`load`: read a checkpoint (folder, GGUF file or hub id) into `Params`.

This file detects the format of a source. Each format has its reader in a file of this package.
`read_checkpoint_info` reads the config and the headers; `load` then reads the weights. No code of a
checkpoint runs: no pickles, no remote code, and chat templates are rendered in a sandbox.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from jfp8kv.checkpoint import hf_folder as hf
from jfp8kv.checkpoint.foreign import PICKLES, check_tokenizer_files
from jfp8kv.checkpoint.hf_tokenizer import read_tokenizer
from jfp8kv.checkpoint.kv_export import prefer_kv_file
from jfp8kv.checkpoint.kv_scales import ScaleReport, check_scales
from jfp8kv.checkpoint.orbax import KV_SCALES, is_saved, load_saved, read_saved_info
from jfp8kv.checkpoint.quantized import dequantize, warn_dequantized
from jfp8kv.checkpoint.tensors import (
    FLOAT_DTYPES,
    StoredTensor,
    equal_tensors,
    load_tree,
    most_common_dtype,
)
from jfp8kv.core.errors import CheckpointError, ConfigError, invalid_choice
from jfp8kv.core.file_contents import PICKLE_ADVICE, describe_file
from jfp8kv.core.paths import looks_like_path
from jfp8kv.core.types import PathLike, WeightsDtype
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import config_from_hf
from jfp8kv.models.families.fields import CONFIG_FILE, mapping
from jfp8kv.models.families.gguf import end_token_sources
from jfp8kv.models.layouts import gguf_modules, hf_modules
from jfp8kv.models.names import ModuleLayout, expected_shapes, unflatten
from jfp8kv.models.params import Params
from jfp8kv.models.quantization import WeightScheme, weight_scheme
from jfp8kv.text.tokenizer import Tokenizer

_HEAD = "lm_head.weight"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load(source: PathLike, dtype: WeightsDtype | None = None, *, strict: bool = True) -> Params:
    """Load the weights, config, tokenizer and KV scales of a checkpoint.

    Weights are streamed: peak memory stays below 1.3 times their size. torch is never imported.
    FP8 and MXFP4 weights are dequantized while they are read, with a warning. KV scales come from
    the file that `export` writes for scales per channel and K offsets, if there is one, else from
    the tensors and the side-car of the checkpoint.

        params = jfp8kv.load("HuggingFaceTB/SmolLM2-135M-Instruct")
        params = jfp8kv.load("models/smollm2.gguf", dtype="float32")

    Args:
      source: a Hugging Face folder (config.json and safetensors files), a folder written by `save`,
        a .gguf file, or a hub id such as "HuggingFaceTB/SmolLM2-135M-Instruct". An existing folder
        of that name is used before the hub. Hub models are downloaded through huggingface_hub and
        its cache (`HF_HUB_OFFLINE` is honoured). A `PathLike` is never a hub id.
      dtype: of the weights: "float32", "bfloat16", "float16", the same as a NumPy or JAX dtype, or
        None for the checkpoint's dtype (for FP8 and MXFP4 weights the one that config.json
        declares; bfloat16 for a quantized GGUF file).
      strict: raise for invalid KV scales: missing for a layer, zero, negative, not finite, of the
        wrong shape, of a layer or name that the model does not have, or half a pair. If False, warn
        with layer and tensor, and use scale 1 (values are stored unscaled) in place of missing and
        invalid scales.

    Raises:
      CheckpointError: a source that is missing, damaged, incomplete, a pickle, or quantized in an
        unsupported way, naming file and tensor; invalid KV scales, naming layer and tensor.
      ConfigError: an unknown `dtype`, or an unsupported architecture or setting.
    """
    target = resolve_dtype(dtype)
    path = locate(source)
    if path.is_dir() and is_saved(path):
        return load_saved(path, target)
    return _load_weights(_read_info(path, needs_weights=True), target, strict)


ModelLike: TypeAlias = Params | str | os.PathLike[str]
"""A model: weights in memory, or a path or hub id that `load` takes."""


def as_params(
    model: ModelLike, *, dtype: WeightsDtype | None = None, strict: bool = True
) -> Params:
    """Return `model` if it is a `Params`, else the `Params` that `load` returns for it.

    Raises `ConfigError` for another type, and for `dtype` or `strict` with weights in memory.
    """
    if isinstance(model, str | os.PathLike):
        return load(model, dtype=dtype, strict=strict)
    if not isinstance(model, Params):
        raise ConfigError(
            f"model of type {type(model).__name__}: must be a Params, a path or a hub id; "
            "wrap a tree with Params.from_pytree(tree, config)."
        )
    if dtype is not None:
        raise ConfigError(
            f"dtype={dtype!r}: the given Params are {model.dtype.name} already; "
            "cast them, or load with dtype."
        )
    if not strict:
        raise ConfigError("strict=False: the given Params are loaded already; load with strict.")
    return model


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint according to its config and headers. The weights are not read.

    Attributes:
      path: the folder or file.
      kind: the format in words, for display.
      config: with `dtype` as the weights are stored. If it ties the output to the embeddings and
        the checkpoint has an output head too, `load` compares their values.
      weights: every tensor of the text model, under the names that `modules` gives (or our names
        for a folder written by `save`); empty if the weights are not present.
      modules: the layout of the weights; empty for a folder written by `save`.
      read_tokenizer: returns the tokenizer, or None if there is none.
      scale_tensors: the KV-cache scale tensors, by full name.
      scale_report: the KV scales of those tensors, of a side-car, or of a file of this library.
      vision_tensors: the number of tensors of a vision encoder, which are ignored.
      weight_scheme: how the weights are quantized, None if they are not.
      end_sources: the ids of end-of-sequence tokens by the file or metadata that names them.
      quant_method: the tool that quantized the checkpoint, perhaps only its KV cache.
    """

    path: Path
    kind: str
    config: ModelConfig
    weights: Mapping[str, StoredTensor]
    modules: Mapping[str, ModuleLayout]
    read_tokenizer: Callable[[], Tokenizer | None]
    scale_tensors: Mapping[str, StoredTensor] = dataclasses.field(default_factory=dict)
    scale_report: ScaleReport = dataclasses.field(default_factory=ScaleReport)
    vision_tensors: int = 0
    weight_scheme: WeightScheme | None = None
    quant_method: str | None = None
    end_sources: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def abstract_params(self) -> Params:
        """Return the `Params` that `load` gives, with a `jax.ShapeDtypeStruct` per array."""
        default = FLOAT_DTYPES[self.config.dtype]
        dtypes = {}
        if not self.modules:
            dtypes = {name: tensor.dtype for name, tensor in self.weights.items()}
        leaves = {
            name: jax.ShapeDtypeStruct(shape, dtypes.get(name, default))
            for name, shape in expected_shapes(self.config).items()
        }
        return Params(
            unflatten(leaves), self.config, self.read_tokenizer(), self.scale_report.scales
        )


def read_checkpoint_info(source: PathLike, *, weights: bool = True) -> CheckpointInfo:
    """Return what `load` would load, without reading the weights.

    Args:
      source: as for `load`.
      weights: if False, the weights may be missing: those of a hub model are not downloaded, and
        headers are read only where the files are present.

    Raises:
      CheckpointError, ConfigError: as `load`, for the config and the headers.
    """
    return _read_info(locate(source, weights=weights), needs_weights=weights)


def read_scale_report(source: PathLike) -> ScaleReport:
    """Return the report on the KV scales of a checkpoint. Weights are not read.

    Invalid scales do not raise: they are issues of the report.

    Raises:
      CheckpointError, ConfigError: as `load`, for the config and the headers.
    """
    path = locate(source)
    if path.is_dir() and not is_saved(path):
        declared = hf.read_config(path)
        _, scales = hf.split_scales(hf.open_weights(path))
        return _folder_scale_report(path, declared, config_from_hf(declared), scales)
    return _read_info(path, needs_weights=True).scale_report


def resolve_dtype(dtype: WeightsDtype | None) -> np.dtype | None:
    """Return the NumPy dtype of weights for a name or a NumPy or JAX dtype; None for None.

    Raises:
      ConfigError: an unknown dtype, with the list of those that are supported.
    """
    if dtype is None:
        return None
    name: str
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in FLOAT_DTYPES:
        raise invalid_choice("dtype", name, FLOAT_DTYPES)
    return FLOAT_DTYPES[name]


def locate(source: PathLike, *, weights: bool = True) -> Path:
    """Return the folder or .gguf file of a source. Hub models are downloaded.

    A folder is used before a hub id of the same name. A file is used if `source` looks like a path:
    if it is `PathLike`, or has a separator or a suffix.
    """
    if not isinstance(source, str | os.PathLike) or not str(source).strip():
        raise ConfigError(
            f"source={source!r}: must be a folder, a .gguf file or a hub id such as 'owner/name'."
        )
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return path
    if path.exists() and looks_like_path(source):
        return _checked_file(path)
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and path.suffix != ".gguf":
        return hf.download(source, weights=weights)
    raise CheckpointError(
        f"{source}: no such file or folder; give a folder, a .gguf file or a hub id such as "
        "'owner/name'."
    )


def _checked_file(path: Path) -> Path:
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path}: give the folder that contains it and its config.json: {path.parent}"
        )
    if path.suffix == ".gguf":
        return path
    found = describe_file(path)
    if found is not None:
        raise CheckpointError(f"{path}: neither a folder nor a .gguf file, but {found}.")
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path}: {PICKLE_ADVICE}")
    raise CheckpointError(f"{path}: neither a folder nor a .gguf file.")


def _read_info(path: Path, *, needs_weights: bool) -> CheckpointInfo:
    if not path.is_dir():
        return _gguf_info(path)
    if is_saved(path):
        return _saved_info(path)
    return _folder_info(path, needs_weights=needs_weights)


def _folder_info(folder: Path, *, needs_weights: bool) -> CheckpointInfo:
    declared = hf.read_config(folder)
    check_tokenizer_files(folder)
    config = config_from_hf(declared)
    scheme = weight_scheme(declared.get("quantization_config"))
    has_weights = needs_weights or any(folder.glob("*.safetensors"))
    tensors = hf.open_weights(folder) if has_weights else {}
    all_weights, scales = hf.split_scales(tensors)
    is_multimodal = "vision_config" in declared
    stored_weights = hf.text_weights(all_weights) if is_multimodal else all_weights
    weights = dequantize(stored_weights, scheme, FLOAT_DTYPES[config.dtype])
    report = _folder_scale_report(folder, declared, config, scales)
    if not tensors:  # missing scales cannot be detected
        notes = report.notes if report.layers else ()
        report = dataclasses.replace(report, notes=(*notes, hf.unread_scales_note(folder)))
    end_sources = {
        CONFIG_FILE: config.eos_ids,
        hf.GENERATION_CONFIG: hf.read_generation_eos_ids(folder, config.vocab),
    }
    config = dataclasses.replace(
        config,
        kv_cache_dtype=config.kv_cache_dtype or report.declared_kv_dtype,
        dtype=most_common_dtype(weights).name if weights else config.dtype,
        eos_ids=merged_ids(end_sources),
    )
    return CheckpointInfo(
        folder,
        "Hugging Face folder",
        config,
        weights,
        hf_modules(config, weights),
        partial(read_tokenizer, folder, vocab=config.vocab),
        end_sources=end_sources,
        scale_tensors=scales,
        scale_report=report,
        vision_tensors=len(all_weights) - len(stored_weights),
        weight_scheme=scheme,
        quant_method=mapping(declared, "quantization_config").get("quant_method"),
    )


def merged_ids(sources: Mapping[str, Iterable[int]]) -> tuple[int, ...]:
    """Return the ids of all sources, each once."""
    return tuple(dict.fromkeys(token for found in sources.values() for token in found))


def _folder_scale_report(
    folder: Path,
    declared: Mapping[str, Any],
    config: ModelConfig,
    scales: Mapping[str, StoredTensor],
) -> ScaleReport:
    parts = (declared, declared.get("text_config") or {})
    report = check_scales(
        config,
        scales,
        quantization=declared.get("quantization_config"),
        sidecar=hf.read_sidecar(folder),
        model_types={part.get("model_type") for part in parts},
    )
    return prefer_kv_file(report, folder, config)


def _gguf_info(path: Path) -> CheckpointInfo:
    from jfp8kv.checkpoint.gguf import open_gguf  # imports the gguf library

    file = open_gguf(path)
    config = dataclasses.replace(file.config, dtype=most_common_dtype(file.tensors).name)
    modules = gguf_modules(config)
    return CheckpointInfo(
        path,
        "GGUF file",
        config,
        file.tensors,
        modules,
        file.read_tokenizer,
        end_sources={f"tokenizer.ggml.{k}": v for k, v in end_token_sources(file.fields).items()},
    )


def _saved_info(folder: Path) -> CheckpointInfo:
    saved, weights = read_saved_info(folder)
    report = ScaleReport()
    if saved.kv_scales is not None:
        report = ScaleReport.from_kv_scales(saved.kv_scales, source=KV_SCALES, file=KV_SCALES)
    return CheckpointInfo(
        folder,
        "folder of jfp8kv.save",
        saved.config,
        weights,
        {},
        lambda: saved.tokenizer,
        scale_report=report,
        end_sources={"config": saved.config.eos_ids},
    )


def _load_weights(info: CheckpointInfo, dtype: np.dtype | None, strict: bool) -> Params:
    config, weights = _resolve_tied_head(info)
    hf.warn_vision_ignored(info.path, info.vision_tensors)
    info.scale_report.raise_or_warn(info.path, strict=strict, stacklevel=4)
    dtype = dtype or FLOAT_DTYPES[config.dtype]
    warn_dequantized(info.path, info.weight_scheme, weights, dtype)
    tree = load_tree(config, weights, info.modules, dtype, where=info.path)
    return Params(tree, config, info.read_tokenizer(), info.scale_report.scales)


def _resolve_tied_head(info: CheckpointInfo) -> tuple[ModelConfig, Mapping[str, StoredTensor]]:
    """Compare the output head with the embeddings, if the config ties them but both are stored.

    An equal head is dropped. A different head is used, and the returned config is untied.
    """
    config = info.config
    weights = info.weights
    if not config.tied_embeddings or _HEAD not in weights:
        return config, weights
    embedding = weights.get(f"{info.modules['embed'].path}.weight")
    if equal_tensors(weights[_HEAD], embedding):
        return config, {name: tensor for name, tensor in weights.items() if name != _HEAD}
    return dataclasses.replace(config, tied_embeddings=False), weights
