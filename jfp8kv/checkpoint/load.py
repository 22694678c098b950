"""`load`: a folder, a file or a hub id becomes `Params`.

What a source is gets decided here and nowhere else; each kind has its reader beside this file. `describe` reads the config and
the headers, and `load` then the weights. Nothing runs code from a checkpoint: no pickles, no remote code, and chat
templates are rendered in a sandbox.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from jfp8kv.checkpoint import folder as hf
from jfp8kv.checkpoint.hub import fetch
from jfp8kv.checkpoint.kv_file import with_own_file
from jfp8kv.checkpoint.kv_scales import FoundScales, find_scales
from jfp8kv.checkpoint.orbax import KV_SCALES, describe_saved, is_saved, load_saved
from jfp8kv.checkpoint.quantized import dequantized, warn_dequantized
from jfp8kv.checkpoint.tensors import FLOATS, StoredTensor, assemble, same_values, weights_dtype
from jfp8kv.checkpoint.tokenizer import read_tokenizer
from jfp8kv.core.errors import CheckpointError, ConfigError, invalid_choice
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import config_from_hf
from jfp8kv.models.families.fields import ids, mapping
from jfp8kv.models.layouts import gguf_modules, hf_modules
from jfp8kv.models.names import Module, expected_shapes, nest
from jfp8kv.models.params import Params
from jfp8kv.models.quantization import WeightScheme, weight_scheme
from jfp8kv.text.tokenizer import Tokenizer

_HEAD = "lm_head.weight"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load(source: str | os.PathLike[str], dtype: Any = None, *, strict: bool = True) -> Params:
    """Load a checkpoint's weights, config, tokenizer and the scales of its KV cache (`Params.kv_scales`; those in the file that
    `export` writes for what other engines do not read go first).

    Weights are streamed: memory peaks below 1.3 times their size. torch is never imported. FP8 and MXFP4 weights are
    dequantized on the way, which a warning says.

    Args:
      source: a Hugging Face folder (config.json and safetensors), a folder that `save` wrote, a .gguf file, or a hub id
        such as "HuggingFaceTB/SmolLM2-135M-Instruct", fetched through huggingface_hub and its cache (`HF_HUB_OFFLINE` is
        honoured).
      dtype: of the weights: "float32", "bfloat16", "float16", the same as a NumPy or JAX dtype, or None to keep the
        checkpoint's (for FP8 and MXFP4 weights the one that config.json declares; bfloat16 for a quantized GGUF file).
      strict: whether a KV scale that is missing for a layer, zero, negative, not finite, of a wrong shape, of a layer or a name
        that the model does not have, or half a pair, is an error. If not, a warning names layer and tensor, and scale 1 (values
        are stored as they are) stands in for what is missing or broken.

    Raises:
      CheckpointError: a source that is missing, damaged, incomplete, a pickle, or quantized in a way that is not read,
        naming file and tensor; KV scales that are not as they should be, naming layer and tensor.
      ConfigError: an unknown `dtype`, or an architecture or setting that is not supported.
    """
    target = resolve_dtype(dtype)
    path = locate(source)
    if path.is_dir() and is_saved(path):
        return load_saved(path, target)
    return _read(_describe(path, needs_weights=True), target, strict)


ModelLike: TypeAlias = Params | str | os.PathLike[str]
"""A model: weights in memory, or a path or hub id that `load` takes."""


def as_params(model: ModelLike, *, dtype: Any = None, strict: bool = True) -> Params:
    """Return `model` if it is a `Params`, else what `load` reads.

    Raises `ConfigError` for another type, and for `dtype` or `strict` of weights in memory.
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
class Described:
    """A checkpoint as its config and headers have it. Of the weights nothing is read.

    Attributes:
      path: the folder or file; `kind` says of what sort, for people.
      config: with `dtype` as the weights are stored. Where it ties the output to the embeddings and the checkpoint repeats
        them, `load` looks whether they are the same.
      weights: every tensor of the text model, under the names that `modules` gives or our own; none where they are not there.
      tokenizer: reads the tokenizer, None if there is none.
      scales: the KV-cache scale tensors by their full names.
      found: what those, a side-car or a file of ours say, layer by layer.
      vision: how many tensors of a vision part are left out.
      scheme: how the weights are quantized; `quantized_by` names the tool, which may have quantized the cache alone.
    """

    path: Path
    kind: str
    config: ModelConfig
    weights: Mapping[str, StoredTensor]
    modules: Mapping[str, Module]
    tokenizer: Callable[[], Tokenizer | None]
    scales: Mapping[str, StoredTensor] = dataclasses.field(default_factory=dict)
    found: FoundScales = dataclasses.field(default_factory=FoundScales)
    vision: int = 0
    scheme: WeightScheme | None = None
    quantized_by: str | None = None

    def shapes(self) -> Params:
        """The `Params` that `load` gives, with a `jax.ShapeDtypeStruct` in the place of every array."""
        usual = FLOATS[self.config.dtype]
        dtypes = (
            {} if self.modules else {name: tensor.dtype for name, tensor in self.weights.items()}
        )
        shapes = expected_shapes(self.config).items()
        tree = nest(
            {name: jax.ShapeDtypeStruct(shape, dtypes.get(name, usual)) for name, shape in shapes}
        )
        return Params(tree, self.config, self.tokenizer(), self.found.scales)


def describe(source: str | os.PathLike[str], *, weights: bool = True) -> Described:
    """What `load` would load, without reading the weights.

    Args:
      source: as for `load`.
      weights: False asks for no weights: of a hub model they are not fetched, and a folder may have none. Their headers are
        read where they are there.

    Raises:
      CheckpointError, ConfigError: as `load`, for all that config and headers can tell.
    """
    return _describe(locate(source, weights=weights), needs_weights=weights)


def _describe(path: Path, *, needs_weights: bool) -> Described:
    if not path.is_dir():
        return _describe_gguf(path)
    return _describe_saved(path) if is_saved(path) else _describe_folder(path, needs_weights)


def resolve_dtype(dtype: Any) -> np.dtype | None:
    """A weight dtype from its name or a NumPy or JAX dtype; None stays None, `ConfigError` with the list otherwise."""
    if dtype is None:
        return None
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in FLOATS:
        raise invalid_choice("dtype", name, FLOATS)
    return FLOATS[name]


def locate(source: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """The folder or .gguf file that `source` means; a hub id that nothing here is named after is fetched, with its weights
    or without."""
    if not isinstance(source, str | os.PathLike) or not str(source).strip():
        raise ConfigError(
            f"source={source!r}: must be a folder, a .gguf file or a hub id such as 'owner/name'."
        )
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return path
    if path.exists():
        return _readable_file(path)
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and path.suffix != ".gguf":
        return fetch(source, weights=weights)
    raise CheckpointError(f"{source}: no such file or folder.")


def _readable_file(path: Path) -> Path:
    if path.suffix in hf.PICKLES:
        raise CheckpointError(f"{path}: {hf.PICKLE_ADVICE}")
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path}: give the folder that holds it and its config.json: {path.parent}"
        )
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path}: neither a folder nor a .gguf file.")
    return path


def load_kv_scales(source: str | os.PathLike[str]) -> FoundScales:
    """The KV scales that come with a checkpoint, layer by layer with a verdict on each. Weights are not read, and nothing
    that is wrong with a scale raises: it is in the report.

    Raises:
      CheckpointError, ConfigError: as `load`, for what its config and headers tell.
    """
    path = locate(source)
    if path.is_dir() and not is_saved(path):
        declared = hf.read_config(path)
        _, scales = hf.split_scales(hf.open_weights(path))
        return _found_scales(path, declared, config_from_hf(declared), scales)
    return _describe(path, needs_weights=True).found


def _found_scales(
    folder: Path,
    described: Mapping[str, Any],
    config: ModelConfig,
    scales: Mapping[str, StoredTensor],
) -> FoundScales:
    found = find_scales(
        config,
        scales,
        quantization=described.get("quantization_config"),
        sidecar=hf.open_sidecar(folder),
        model_types={
            part.get("model_type") for part in (described, described.get("text_config") or {})
        },
    )
    return with_own_file(found, folder, config)


def _describe_folder(folder: Path, needs_weights: bool) -> Described:
    declared = hf.read_config(folder)
    config, scheme = config_from_hf(declared), weight_scheme(declared.get("quantization_config"))
    tensors = hf.open_weights(folder) if needs_weights or any(folder.glob("*.safetensors")) else {}
    weights, scales = hf.split_scales(tensors)
    seen = hf.without_vision(weights) if "vision_config" in declared else weights
    text = dequantized(seen, scheme, FLOATS[config.dtype])
    found = _found_scales(folder, declared, config, scales)
    if not tensors:  # what is missing among them cannot be told
        found = dataclasses.replace(
            found, notes=(*(found.notes if found.layers else ()), hf.unread_scales(folder))
        )
    config = dataclasses.replace(
        config,
        kv_cache_dtype=config.kv_cache_dtype or found.declares,
        dtype=weights_dtype(text).name if text else config.dtype,
        eos_ids=ids([*config.eos_ids, *ids(hf.generation_eos_ids(folder))]),
    )
    return Described(
        folder,
        "Hugging Face folder",
        config,
        text,
        hf_modules(config, text),
        partial(read_tokenizer, folder, eos_ids=config.eos_ids),
        scales=scales,
        found=found,
        vision=len(weights) - len(seen),
        scheme=scheme,
        quantized_by=mapping(declared, "quantization_config").get("quant_method"),
    )


def _describe_gguf(path: Path) -> Described:
    from jfp8kv.checkpoint.gguf import open_gguf  # the gguf library is only needed here

    file = open_gguf(path)
    config = dataclasses.replace(file.config, dtype=weights_dtype(file.tensors).name)
    return Described(path, "GGUF file", config, file.tensors, gguf_modules(config), file.tokenizer)


def _describe_saved(folder: Path) -> Described:
    config, tokenizer, scales, weights = describe_saved(folder)
    found = (
        FoundScales()
        if scales is None
        else dataclasses.replace(FoundScales.of(scales, source=KV_SCALES), file=KV_SCALES)
    )
    return Described(
        folder, "folder of jfp8kv.save", config, weights, {}, lambda: tokenizer, found=found
    )


def _read(found: Described, dtype: np.dtype | None, strict: bool) -> Params:
    config, weights = _with_its_head(found)
    hf.warn_without_vision(found.path, found.vision)
    found.found.say(found.path, strict=strict, stacklevel=4)
    dtype = dtype or FLOATS[config.dtype]
    warn_dequantized(found.path, found.scheme, weights, dtype)
    tree = assemble(config, weights, found.modules, dtype, where=found.path)
    return Params(tree, config, found.tokenizer(), found.found.scales)


def _with_its_head(found: Described) -> tuple[ModelConfig, Mapping[str, StoredTensor]]:
    """The config and weights once it is known what a head beside tied embeddings is: a copy of them, which is left out, or a
    head of its own, whatever the config says."""
    config, weights = found.config, found.weights
    if not config.tied_embeddings or _HEAD not in weights:
        return config, weights
    tied = same_values(weights[_HEAD], weights.get(f"{found.modules['embed'].path}.weight"))
    kept = {name: tensor for name, tensor in weights.items() if not (tied and name == _HEAD)}
    return dataclasses.replace(config, tied_embeddings=tied), kept
