"""`save` writes `Params` as a folder that `load` reads back exactly: weights through Orbax, the rest as JSON beside them.

    folder/jfp8kv.json             the format's version, the `ModelConfig`, the tokenizer's template and special tokens
    folder/weights/                an Orbax checkpoint of `Params.tree`
    folder/tokenizer.json          if there is a tokenizer
    folder/kv_scales.safetensors   if there are KV scales

The folder appears whole or not at all. Weights are read one parameter at a time, the largest first, so that what is held
twice is never more than what is still to come.
"""

import json
import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jfp8kv.cache.scales import KVScales, check_shape
from jfp8kv.checkpoint.folder import INDEX, read_json
from jfp8kv.checkpoint.plain import from_plain, to_plain
from jfp8kv.checkpoint.tensors import StoredTensor, chunks, parameter
from jfp8kv.checkpoint.tokenizer import TOKENIZER, require_written_form, written_special_tokens
from jfp8kv.checkpoint.whole import is_free, written_whole
from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.names import Shape, Source, expected_shapes, nest, require_names, require_shape
from jfp8kv.models.params import Params
from jfp8kv.text.tokenizer import Tokenizer

FORMAT, VERSION = "jfp8kv.Params", 1
ABOUT, WEIGHTS, KV_SCALES = "jfp8kv.json", "weights", "kv_scales.safetensors"
_HUGGING_FACE = ("config.json", "model.safetensors", INDEX)
_ORBAX = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt")
_CHUNK_BYTES = 64 << 20  # allocations of this size go back to the system when freed


def save(params: Params, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a model to a folder that `load` reads back bit for bit: weights, config, tokenizer and KV scales.

    Args:
      folder: where to; folders above it are made. It must not exist, or be empty.
      overwrite: replace what `save` wrote there before. Any other folder is left alone.

    Raises:
      CheckpointError: the folder exists, or cannot be written.
      ConfigError: something that is not `Params`, or whose tokenizer or scales have no written form.
    """
    if not isinstance(params, Params):
        raise ConfigError(
            f"params of type {type(params).__name__}: must be a Params, as from load or Params.from_pytree."
        )
    path = Path(os.path.expanduser(folder)).resolve()
    about = {
        "format": FORMAT,
        "version": VERSION,
        "config": to_plain(params.config),
        **_described(params),
    }
    with written_whole(path) as beside:
        _require_free(path, overwrite)
        _write(params, about, beside)


def _described(params: Params) -> dict[str, Any]:
    tokenizer, scales = params.tokenizer, params.kv_scales
    require_written_form(tokenizer)
    if scales is not None and not isinstance(scales, KVScales):
        raise ConfigError(
            f"kv_scales of type {type(scales).__name__}: must be a KVScales, or None."
        )
    about: dict[str, Any] = {"tokenizer": None, "kv_scales": scales is not None}
    if tokenizer is not None:
        about["tokenizer"] = {
            "chat_template": tokenizer.chat_template,
            "special_tokens": written_special_tokens(tokenizer),
            "eos_ids": list(tokenizer.eos_ids),
        }
    return about


def _require_free(path: Path, overwrite: bool) -> None:
    if is_free(path):
        return
    if not (path / ABOUT).is_file():
        raise CheckpointError(
            f"{path}: exists and was not written by jfp8kv.save: give another folder."
        )
    if not overwrite:
        raise CheckpointError(
            f"{path}: holds a saved model already: give another folder, or overwrite=True."
        )


def _write(params: Params, about: Mapping[str, Any], folder: Path) -> None:
    import orbax.checkpoint as ocp

    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params.tree)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(
                folder / WEIGHTS, args=ocp.args.PyTreeSave(params.tree, save_args=save_args)
            )
    except Exception as error:  # Orbax lets through those of its writers and of TensorStore
        raise CheckpointError(
            f"{folder.parent}: the weights cannot be written ({_first_line(error)})."
        ) from error
    if params.tokenizer is not None:
        (folder / TOKENIZER).write_text(params.tokenizer.backend.to_str(), encoding="utf-8")
    if params.kv_scales is not None:
        params.kv_scales.save(folder / KV_SCALES)
    (folder / ABOUT).write_text(
        json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def is_saved(folder: Path) -> bool:
    """Whether `save` wrote this folder.

    Raises:
      CheckpointError: it holds a Hugging Face model too, or is an Orbax checkpoint of something else.
    """
    theirs = next((name for name in _HUGGING_FACE if (folder / name).exists()), None)
    if (folder / ABOUT).is_file():
        if theirs:
            raise CheckpointError(
                f"{folder}: holds both {ABOUT} of a saved model and {theirs} of a Hugging Face one: keep one of them there."
            )
        return True
    if theirs is None and (
        found := next((name for name in _ORBAX if (folder / name).exists()), None)
    ):
        raise CheckpointError(
            f"{folder}: an Orbax checkpoint ({found}) without {ABOUT}, so not written by jfp8kv.save. If it is the weights of "
            "one that was, give the folder above; else restore it with Orbax and use Params.from_pytree(tree, config)."
        )
    return False


def load_saved(folder: Path, dtype: np.dtype | None) -> Params:
    """The `Params` that `save` wrote; weights in their own dtypes, or all in `dtype`.

    Raises:
      CheckpointError: written by a newer version, damaged, truncated, or out of `dtype`'s range.
    """
    config, tokenizer, scales = _about(folder)
    expected, path = expected_shapes(config), folder / WEIGHTS
    with _checkpointer() as checkpointer:
        found = _checked(path, expected, checkpointer)
        largest_first = sorted(expected, key=lambda name: math.prod(expected[name]), reverse=True)
        whole = {name: [Source(name, shape, shape)] for name, shape in expected.items()}
        read = {
            name: parameter(expected[name], whole[name], found, dtype or found[name].dtype)
            for name in largest_first
        }
    return Params(nest({name: read[name] for name in expected}), config, tokenizer, scales)


def describe_saved(
    folder: Path,
) -> tuple[ModelConfig, Tokenizer | None, KVScales | None, dict[str, StoredTensor]]:
    """What `load_saved` would load: config, tokenizer, KV scales, and the weights by name, unread. Errors as there."""
    config, tokenizer, scales = _about(folder)
    with _checkpointer() as checkpointer:
        return (
            config,
            tokenizer,
            scales,
            _checked(folder / WEIGHTS, expected_shapes(config), checkpointer),
        )


def _about(folder: Path) -> tuple[ModelConfig, Tokenizer | None, KVScales | None]:
    """All that lies beside the weights."""
    about = read_json(folder / ABOUT)
    _require_version(folder, about)
    try:
        config = from_plain(about["config"])
        if not isinstance(config, ModelConfig):
            raise TypeError(f"config is a {type(config).__name__}")
        expected_shapes(config)  # raises where a field of the config is of the wrong type
        tokenizer = _tokenizer(folder, about["tokenizer"])
        has_scales = about["kv_scales"]
    except CheckpointError:
        raise
    except Exception as error:  # whatever a field of the wrong type leads to
        raise CheckpointError(
            f"{folder / ABOUT}: damaged ({type(error).__name__}: {error})."
        ) from error
    return config, tokenizer, _scales(folder / KV_SCALES, config) if has_scales else None


def _scales(path: Path, config: ModelConfig) -> KVScales:
    """Scales from a file of ours, which belong to a model of this config."""
    try:
        scales = KVScales.load(path)
        check_shape(
            scales, layers=config.layers, kv_heads=config.kv_heads, head_dim=config.head_dim
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return scales


def _require_version(folder: Path, about: Mapping[str, Any]) -> None:
    version = about.get("version")
    if about.get("format") != FORMAT or type(version) is not int or version < 1:
        raise CheckpointError(
            f"{folder / ABOUT}: damaged: format {about.get('format')!r}, version {version!r}."
        )
    if version > VERSION:
        raise CheckpointError(
            f"{folder}: saved in version {version} of the format by a newer jfp8kv; this one reads up to {VERSION}: upgrade it."
        )


def _tokenizer(folder: Path, about: Mapping[str, Any] | None) -> Tokenizer | None:
    if about is None:
        return None
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # the library raises bare Exception for what it cannot parse
        raise CheckpointError(
            f"{folder / TOKENIZER}: not a readable tokenizer: {error}."
        ) from error
    return Tokenizer(
        backend,
        chat_template=about["chat_template"],
        special_tokens=about["special_tokens"],
        eos_ids=about["eos_ids"],
    )


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def _checked(
    path: Path, expected: Mapping[str, Shape], checkpointer: Any
) -> dict[str, StoredTensor]:
    """Every array of the weights by its dotted name, once names and shapes are those expected."""
    found = _stored(path, checkpointer)
    require_names(found, expected, where=str(path))
    for name, shape in expected.items():
        require_shape(name, found[name].shape, shape, where=str(path))
    return found


def _stored(path: Path, checkpointer: Any) -> dict[str, StoredTensor]:
    """Every array of an Orbax checkpoint, by its dotted name."""
    try:
        described = checkpointer.metadata(path).item_metadata
        if described is None:
            raise ValueError("the list of its arrays is missing or damaged")
        leaves = jax.tree_util.tree_leaves_with_path(described.tree)
        found = {
            jax.tree_util.keystr(keys, simple=True, separator="."): leaf for keys, leaf in leaves
        }
        return {
            name: StoredTensor(
                name,
                tuple(leaf.shape),
                str(leaf.dtype),
                np.dtype(leaf.dtype),
                path,
                partial(_read, path, checkpointer, name),
            )
            for name, leaf in found.items()
        }
    except (
        Exception
    ) as error:  # Orbax lets through those of its readers, of JSON and of TensorStore
        raise CheckpointError(
            f"{path}: not a readable Orbax checkpoint ({_first_line(error)}): fetch or save it again."
        ) from error


def _read(path: Path, checkpointer: Any, name: str, out: np.ndarray) -> None:
    import orbax.checkpoint as ocp

    target = nest({name: 0})
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    restore = ocp.args.PyTreeRestore(item=target, restore_args=as_numpy, partial_restore=True)
    try:
        (array,) = jax.tree.leaves(checkpointer.restore(path, args=restore))
    except Exception as error:  # as above
        raise CheckpointError(
            f"{path}: {name} cannot be read ({_first_line(error)}): fetch or save it again."
        ) from error
    flat, source = out.reshape(-1), np.asarray(array).reshape(-1)
    for part in chunks(flat.size, source.dtype.itemsize):
        with np.errstate(over="ignore"):  # read_into reports values that do not fit
            flat[part] = source[part].astype(out.dtype)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
