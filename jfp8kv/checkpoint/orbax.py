"""`save` writes `Params` to a folder that `load` reads back exactly: weights through Orbax, JSON.

    folder/jfp8kv.json             format version, `ModelConfig`, chat template and special tokens
    folder/weights/                an Orbax checkpoint of `Params.tree`
    folder/tokenizer.json          if there is a tokenizer
    folder/kv_scales.safetensors   if there are KV scales

The folder is written atomically. Weights are read one parameter at a time, the largest first, so
that the temporary copy is never larger than the weights that are still to be read.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import pydantic

from jfp8kv.cache.scales import KVScales, check_shape
from jfp8kv.checkpoint.atomic_folder import atomic_folder, is_missing_or_empty
from jfp8kv.checkpoint.hf_folder import INDEX, read_json
from jfp8kv.checkpoint.hf_tokenizer import (
    TOKENIZER,
    read_backend,
    require_serializable,
    special_tokens_json,
)
from jfp8kv.checkpoint.tensors import StoredTensor, chunks, load_parameter
from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.core.types import PathLike
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.names import (
    Shape,
    TensorSource,
    expected_shapes,
    require_names,
    require_shape,
    unflatten,
)
from jfp8kv.models.params import Params
from jfp8kv.text.tokenizer import Tokenizer

FORMAT = "jfp8kv.Params"
VERSION = 1
DESCRIPTION = "jfp8kv.json"
WEIGHTS = "weights"
KV_SCALES = "kv_scales.safetensors"
_HUGGING_FACE = ("config.json", "model.safetensors", INDEX)
_TREE = "_METADATA"  # Orbax's list of the arrays, a JSON object
_ORBAX = ("_CHECKPOINT_METADATA", _TREE, "manifest.ocdbt")
_CHUNK_BYTES = 64 << 20  # allocations of this size return to the system when freed
# Orbax and TensorStore raise these for checkpoints that are damaged or cannot be written.
_ORBAX_ERRORS = (OSError, ValueError, KeyError)
_CLASS_TAG = "type"  # the key that names the class of a dataclass in JSON

T = TypeVar("T")


# Writing


def save(params: Params, folder: PathLike, *, overwrite: bool = False) -> None:
    """Write a model to a folder that `load` reads back bit for bit.

    The folder has the weights, the config, the tokenizer and the KV scales.

        jfp8kv.save(params, "out")
        params = jfp8kv.load("out")

    Args:
      params: the model.
      folder: must not exist, or be empty. Parent folders are created.
      overwrite: replace a folder that `save` wrote. Any other folder is refused.

    Raises:
      CheckpointError: the folder is not empty, or cannot be written.
      ConfigError: not a `Params`, or a tokenizer or scales that cannot be written.
    """
    if not isinstance(params, Params):
        raise ConfigError(
            f"params of type {type(params).__name__}: must be a Params, as from load or "
            "Params.from_pytree."
        )
    path = Path(os.path.expanduser(folder)).resolve()
    description = _description(params)
    with atomic_folder(path) as temporary:
        _require_free(path, overwrite)
        _write(params, description, temporary)


def _description(params: Params) -> dict[str, Any]:
    tokenizer = params.tokenizer
    require_serializable(tokenizer)
    scales = params.kv_scales
    if scales is not None and not isinstance(scales, KVScales):
        raise ConfigError(
            f"kv_scales of type {type(scales).__name__}: must be a KVScales, or None."
        )
    description: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "config": to_json(params.config),
        "tokenizer": None,
        "kv_scales": scales is not None,
    }
    if tokenizer is not None:
        description["tokenizer"] = {
            "chat_template": tokenizer.chat_template,
            "special_tokens": special_tokens_json(tokenizer),
            "eos_ids": list(tokenizer.eos_ids),
        }
    return description


def _require_free(path: Path, overwrite: bool) -> None:
    if is_missing_or_empty(path):
        return
    if not (path / DESCRIPTION).is_file():
        raise CheckpointError(
            f"{path}: exists and was not written by jfp8kv.save: give another folder."
        )
    if not overwrite:
        raise CheckpointError(
            f"{path}: already contains a saved model: give another folder, or overwrite=True."
        )


def _write(params: Params, description: Mapping[str, Any], folder: Path) -> None:
    import orbax.checkpoint as ocp

    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params.tree)
    try:
        with _checkpointer() as checkpointer:
            args = ocp.args.PyTreeSave(params.tree, save_args=save_args)
            checkpointer.save(folder / WEIGHTS, args=args)
    except _ORBAX_ERRORS as error:
        raise CheckpointError(
            f"{folder.parent}: the weights cannot be written ({_first_line(error)})."
        ) from error
    if params.tokenizer is not None:
        (folder / TOKENIZER).write_text(params.tokenizer.backend.to_str(), encoding="utf-8")
    if params.kv_scales is not None:
        params.kv_scales.save(folder / KV_SCALES)
    text = json.dumps(description, indent=2, ensure_ascii=False)
    (folder / DESCRIPTION).write_text(f"{text}\n", encoding="utf-8")


# Reading


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """What `save` wrote in addition to the weights."""

    config: ModelConfig
    tokenizer: Tokenizer | None
    kv_scales: KVScales | None


def is_saved(folder: Path) -> bool:
    """Return whether `save` wrote this folder.

    Raises:
      CheckpointError: the folder contains a Hugging Face model too, or is another Orbax checkpoint.
    """
    hugging_face = next((name for name in _HUGGING_FACE if (folder / name).exists()), None)
    if (folder / DESCRIPTION).is_file():
        if hugging_face:
            raise CheckpointError(
                f"{folder}: contains both {DESCRIPTION} of a saved model and {hugging_face} of a "
                "Hugging Face model: keep one of them."
            )
        return True
    orbax = next((name for name in _ORBAX if (folder / name).exists()), None)
    if orbax and not hugging_face:
        raise CheckpointError(
            f"{folder}: an Orbax checkpoint ({orbax}) without {DESCRIPTION}, so not written by "
            "jfp8kv.save. If it is the weights of a saved model, give the folder above; else "
            "restore it with Orbax and use Params.from_pytree(tree, config)."
        )
    return False


def load_saved(folder: Path, dtype: np.dtype | None) -> Params:
    """Return the `Params` that `save` wrote, in their dtypes or all in `dtype`.

    Raises:
      CheckpointError: written by a newer version, damaged, truncated, or out of `dtype`'s range.
    """
    saved = _read_description(folder)
    shapes = expected_shapes(saved.config)
    sources = {name: [TensorSource(name, shape, shape)] for name, shape in shapes.items()}
    leaves = {}
    with _checkpointer() as checkpointer:
        stored = _open_weights(folder / WEIGHTS, shapes, checkpointer)
        for name in sorted(shapes, key=lambda name: math.prod(shapes[name]), reverse=True):
            target = dtype or stored[name].dtype
            assert target is not None, "arrays of Orbax checkpoints have a dtype"
            leaves[name] = load_parameter(shapes[name], sources[name], stored, target)
    tree = unflatten({name: leaves[name] for name in shapes})
    return Params(tree, saved.config, saved.tokenizer, saved.kv_scales)


def read_saved_info(folder: Path) -> tuple[SavedModel, dict[str, StoredTensor]]:
    """Return what `load_saved` would load, with the weights unread, by name. Raises the same."""
    saved = _read_description(folder)
    with _checkpointer() as checkpointer:
        weights = _open_weights(folder / WEIGHTS, expected_shapes(saved.config), checkpointer)
    return saved, weights


class _SavedTokenizer(pydantic.BaseModel):
    """The entry "tokenizer" of the description."""

    chat_template: str | dict[str, str] | None
    special_tokens: dict[str, Any]
    eos_ids: tuple[int, ...]


class _Description(pydantic.BaseModel):
    """The entries of jfp8kv.json that are read after its version."""

    config: Any
    tokenizer: _SavedTokenizer | None
    kv_scales: bool


def _read_description(folder: Path) -> SavedModel:
    path = folder / DESCRIPTION
    content = read_json(path)
    _require_version(folder, content)
    try:
        description = _Description.model_validate(content)
        config = from_json(ModelConfig, description.config)
    except pydantic.ValidationError as error:
        raise CheckpointError(f"{path}: damaged ({_validation_issues(error)}).") from error
    saved = description.tokenizer
    return SavedModel(
        config,
        None if saved is None else _read_tokenizer(folder / TOKENIZER, saved),
        _read_scales(folder / KV_SCALES, config) if description.kv_scales else None,
    )


def _require_version(folder: Path, content: Mapping[str, Any]) -> None:
    version = content.get("version")
    if content.get("format") != FORMAT or type(version) is not int or version < 1:
        raise CheckpointError(
            f"{folder / DESCRIPTION}: damaged: format {content.get('format')!r}, "
            f"version {version!r}."
        )
    if version > VERSION:
        raise CheckpointError(
            f"{folder}: saved in version {version} of the format by a newer jfp8kv; this one reads "
            f"up to {VERSION}: upgrade it."
        )


def _validation_issues(error: pydantic.ValidationError) -> str:
    """Return the first three issues on one line, such as "config.vocab: Field required"."""
    issues = error.errors(include_url=False)
    shown = [f"{'.'.join(map(str, issue['loc']))}: {issue['msg']}" for issue in issues[:3]]
    more = [f"and {len(issues) - 3} more"] if len(issues) > 3 else []
    return "; ".join(shown + more)


def _read_tokenizer(path: Path, saved: _SavedTokenizer) -> Tokenizer:
    return Tokenizer(
        read_backend(path),
        chat_template=saved.chat_template,
        special_tokens=saved.special_tokens,
        eos_ids=saved.eos_ids,
    )


def _read_scales(path: Path, config: ModelConfig) -> KVScales:
    """Return the scales in a file, checked against the shapes of the config."""
    try:
        scales = KVScales.load(path)
        check_shape(
            scales, layers=config.layers, kv_heads=config.kv_heads, head_dim=config.head_dim
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return scales


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def _open_weights(
    path: Path, expected: Mapping[str, Shape], checkpointer: Any
) -> dict[str, StoredTensor]:
    """Return every array by its dotted name, after checking names and shapes."""
    stored = _stored_tensors(path, checkpointer)
    require_names(stored, expected, where=str(path))
    for name, shape in expected.items():
        require_shape(name, stored[name].shape, shape, where=str(path))
    return stored


def _stored_tensors(path: Path, checkpointer: Any) -> dict[str, StoredTensor]:
    if (path / _TREE).is_file():
        read_json(path / _TREE)  # Orbax assumes that it is a JSON object
    try:
        metadata = checkpointer.metadata(path).item_metadata
    except _ORBAX_ERRORS as error:
        raise _unreadable(path, _first_line(error)) from error
    if metadata is None:
        raise _unreadable(path, "the list of its arrays is missing or damaged")
    leaves = {
        jax.tree_util.keystr(keys, simple=True, separator="."): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(metadata.tree)
    }
    return {
        name: StoredTensor(
            name,
            tuple(leaf.shape),
            str(leaf.dtype),
            np.dtype(leaf.dtype),
            path,
            partial(_read_array, path, checkpointer, name),
        )
        for name, leaf in leaves.items()
    }


def _unreadable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: not a readable Orbax checkpoint ({reason}): download or save it again."
    )


def _read_array(path: Path, checkpointer: Any, name: str, out: np.ndarray) -> None:
    import orbax.checkpoint as ocp

    target = unflatten({name: 0})
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    restore = ocp.args.PyTreeRestore(item=target, restore_args=as_numpy, partial_restore=True)
    try:
        restored = checkpointer.restore(path, args=restore)
    except _ORBAX_ERRORS as error:
        raise CheckpointError(
            f"{path}: {name} cannot be read ({_first_line(error)}): download or save it again."
        ) from error
    (array,) = jax.tree.leaves(restored)
    flat = out.reshape(-1)
    source = np.asarray(array).reshape(-1)
    for part in chunks(flat.size, source.dtype.itemsize):
        with np.errstate(over="ignore"):  # read_into reports values that do not fit
            flat[part] = source[part].astype(out.dtype)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:200] or type(error).__name__


# Configs as JSON


def to_json(value: Any) -> Any:
    """Convert a config to JSON values: dataclasses become objects with a tag, tuples lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
        assert _CLASS_TAG not in fields, f"no field can be called {_CLASS_TAG!r}"
        return {_CLASS_TAG: type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    assert value is None or isinstance(value, str | bool | int | float), f"{value!r} is not JSON"
    return value


def from_json(cls: type[T], value: Any) -> T:
    """Return the config of class `cls` that `to_json` converted.

    A missing field gets its default, so that files of older versions can be read.

    Raises:
      pydantic.ValidationError: an unknown field, or a missing or invalid value.
    """
    # The settings of a model apply to the dataclasses in it.
    settings = pydantic.ConfigDict(extra="forbid")
    model: Any = pydantic.create_model("Saved", __config__=settings, config=(cls, ...))
    config: T = model.model_validate({"config": _without_tags(value)}).config
    return config


def _without_tags(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_tags(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _without_tags(item) for name, item in value.items() if name != _CLASS_TAG}
    return value
