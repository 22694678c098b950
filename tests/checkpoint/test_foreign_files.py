"""Files that are not what their name says are refused with what they are and what to do."""

import gzip
import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from jfp8kv.cache.scales import KVScales
from jfp8kv.checkpoint import load
from jfp8kv.checkpoint.load import read_checkpoint_info
from jfp8kv.core.errors import CheckpointError
from jfp8kv.models.params import Params

INDEX = "model.safetensors.index.json"


def zip_of(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, b"x" * 100)
    return file.getvalue()


def tar_of(name: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return file.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PLACEHOLDERS = {
    "Git LFS": (LFS, "a Git LFS pointer", "git lfs pull"),
    "early Git LFS": (
        b"version https://hawser.github.com/spec/v1\noid sha256:4d7a\nsize 9\n",
        "a Git LFS pointer",
        "git lfs pull",
    ),
    "git-annex": (b"/annex/objects/SHA256E-s12--ab\n", "a git-annex pointer", "git annex get"),
    "page": (b"<!DOCTYPE html>\n<html><body>Not found</body></html>", "a web page", "resolve"),
    "page in lower case": (b"\n\n  <!doctype html><html></html>", "a web page", "resolve"),
    "page without doctype": (b"<html lang='en'><head></head></html>", "a web page", "resolve"),
    "page with a byte order mark": (b"\xef\xbb\xbf<HTML></HTML>", "a web page", "resolve"),
    "XHTML": (b"<?xml version='1.0'?>\n<!DOCTYPE html><html></html>", "a web page", "resolve"),
    "XML error": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML", "again"),
}
FORMATS = {
    "new PyTorch": (zip_of("archive/data.pkl"), "a PyTorch pickle", "save_pretrained"),
    "old PyTorch": (
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(99),
        "PyTorch or Python pickle",
        "convert",
    ),
    "pickle": (
        b"\x80\x04\x95\x40" + bytes(7) + b"}\x94." + bytes(99),
        "PyTorch or Python pickle",
        "save_pretrained",
    ),
    "NumPy archive": (zip_of("weight.npy"), "a ZIP archive", "unpack"),
    "tar": (tar_of("model.safetensors"), "a tar archive", "unpack"),
    "gzip": (gzip.compress(b"x"), "a compressed file", "unpack"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5", "convert"),
    "error of a server": (b'{"error": "Repository not found"}', "JSON text", "download"),
    "zeros": (bytes(4096), "interrupted download", "again"),
    "empty": (b"", "an empty file", "again"),
}


@pytest.fixture
def folder(tiny, tmp_path):
    config = tiny.config()
    return tiny.folder(tmp_path / "model", config, tiny.tensors(config))


def refused(source, *parts):
    for read in (load, read_checkpoint_info):
        with pytest.raises(CheckpointError) as error:
            read(source)
        message = str(error.value)
        assert all(part.lower() in message.lower() for part in parts), message
        assert "\n" not in message


@pytest.mark.parametrize("case", [*PLACEHOLDERS, *FORMATS])
def test_weights_in_another_format_are_named(folder, case):
    content, *expected = (PLACEHOLDERS | FORMATS)[case]
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "model.safetensors: not a safetensors file", *expected)


@pytest.mark.parametrize("case", [*PLACEHOLDERS, *FORMATS])
def test_a_gguf_file_in_another_format_is_named(tmp_path, case):
    content, *expected = (PLACEHOLDERS | FORMATS)[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    refused(path, "model.gguf: not a GGUF file", *expected)


@pytest.mark.parametrize("case", [*PLACEHOLDERS, *FORMATS])
@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model"])
def test_a_single_file_in_another_format_is_named(tmp_path, case, name):
    content, *expected = (PLACEHOLDERS | FORMATS)[case]
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, "neither a folder nor a .gguf file", *expected)


def test_gguf_files_under_other_names_are_named(tiny, folder, tmp_path):
    config = tiny.config()
    path = tiny.gguf(tmp_path / "a.gguf", config, tiny.tensors(config))
    (folder / "model.safetensors").write_bytes(path.read_bytes())
    refused(folder, "model.safetensors", "a GGUF file", "rename it to .gguf")
    path.rename(tmp_path / "a.bin")
    refused(tmp_path / "a.bin", "a GGUF file", "rename it to .gguf")
    (tmp_path / "old.gguf").write_bytes(b"tjgg\x03\0\0\0" + bytes(99))
    refused(tmp_path / "old.gguf", "before GGUF", "convert")


@pytest.mark.parametrize("case", PLACEHOLDERS)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "tokenizer.model",
    ],
)
def test_a_pointer_or_web_page_in_place_of_a_small_file_is_named(folder, name, case):
    content, *expected = PLACEHOLDERS[case]
    (folder / name).write_bytes(content)
    refused(folder, f"{name}: not ", *expected)


def test_a_pointer_in_place_of_a_shard_or_index_is_named(tiny, tmp_path):
    config = tiny.config()
    folder = tiny.folder(tmp_path, config, tiny.tensors(config), shards=2)
    (folder / "model-00002-of-00002.safetensors").write_bytes(LFS)
    refused(folder, "model-00002-of-00002.safetensors", "Git LFS pointer")
    (folder / INDEX).write_bytes(LFS)
    refused(folder, INDEX, "Git LFS pointer")


def test_a_hub_model_whose_weights_are_only_pickles_is_named(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match=r"only in \.bin files: pickle .*save_pretrained"):
        load(folder)


@pytest.mark.parametrize("case", PLACEHOLDERS)
def test_a_pointer_or_web_page_in_place_of_kv_scales_is_named(tmp_path, case):
    content, *expected = PLACEHOLDERS[case]
    (tmp_path / "scales.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        KVScales.load(tmp_path / "scales.safetensors")
    assert all(part in str(error.value) for part in ("not a KVScales file", *expected))


# -- adapters --------------------------------------------------------------------------------------


def write_adapter(folder, weights="adapter_model.safetensors", base="meta-llama/Llama-3.2-1B"):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    config = {"peft_type": "LORA", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if weights.endswith(".safetensors"):
        safetensors.numpy.save_file({name: np.ones((2, 4), np.float32)}, folder / weights)
    else:
        (folder / weights).write_bytes(zip_of("archive/data.pkl"))


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_alone_is_named_with_its_base_model(folder, weights, with_config):
    (folder / "model.safetensors").unlink()
    if not with_config:
        (folder / "config.json").unlink()
    write_adapter(folder, weights)
    refused(folder, "only an adapter for meta-llama/Llama-3.2-1B", "PEFT", "merge_and_unload")
    (folder / "adapter_config.json").unlink()
    refused(folder, "only an adapter (PEFT)", "merge_and_unload")


def test_an_adapter_beside_the_weights_is_reported(folder):
    write_adapter(folder)
    with pytest.warns(UserWarning, match="its adapter .* is ignored"):
        assert load(folder).size > 0


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"base_model.model.{name}",
        lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"),
        lambda name: name.replace("q_proj.weight", "q_proj.lora_A.default.weight"),
        lambda name: name.replace("lm_head.", "lm_head.modules_to_save.default."),
    ],
)
def test_weights_with_an_unmerged_adapter_are_named(tiny, tmp_path, rename):
    config = tiny.config()
    tensors = {rename(name): tensor for name, tensor in tiny.tensors(config).items()}
    refused(tiny.folder(tmp_path, config, tensors), "a tensor of an adapter", "merge_and_unload")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("adapter", "only a LoRA adapter"), ("mmproj", "encoder"), ("imatrix", "importance matrix")],
)
def test_gguf_files_of_other_types_are_named(tiny, tmp_path, kind, expected):
    config = tiny.config()
    path = tiny.gguf(
        tmp_path / "a.gguf", config, tiny.tensors(config), more=lambda w: w.add_type(kind)
    )
    refused(path, "a.gguf", expected)


# -- wrapped modules, shards and folders -----------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    ("prefix", "wrapper"),
    [
        ("module.", "DistributedDataParallel"),
        ("_orig_mod.", "torch.compile"),
        ("_orig_mod.module.", "torch.compile"),
        ("module._orig_mod.", "DistributedDataParallel"),
        ("_fsdp_wrapped_module.", "FSDP"),
    ],
)
def test_weights_of_a_wrapped_module_are_named(tiny, tmp_path, prefix, wrapper, shards):
    config = tiny.config()
    tensors = {prefix + name: tensor for name, tensor in tiny.tensors(config).items()}
    refused(tiny.folder(tmp_path, config, tensors, shards), ".safetensors", prefix[:-1], wrapper)


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("module.", "DistributedDataParallel"),
        ("_orig_mod.", "torch.compile"),
        ("base_model.model.", "a tensor of an adapter"),
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_a_tree_of_a_wrapped_module_is_named(tiny, prefix, expected, nested):
    config = tiny.config()
    tensors = tiny.tensors(config)
    tree = {prefix + name: tensor for name, tensor in tensors.items()}
    if nested:
        tree = {prefix[:-1]: tensors}
    with pytest.raises(CheckpointError, match=f"the given tree: .*{expected}"):
        Params.from_pytree(tree, config)


def test_a_module_wrapped_inside_the_model_is_named(tiny, tmp_path):
    config = tiny.config()
    tensors = {
        name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."): tensor
        for name, tensor in tiny.tensors(config).items()
    }
    refused(tiny.folder(tmp_path, config, tensors), "activation checkpointing")


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_tensor_in_two_shards_is_refused_with_both(tiny, tmp_path, name, equal, indexed):
    config = tiny.config()
    tensors = tiny.tensors(config)
    folder = tiny.folder(tmp_path, config, tensors, shards=2)
    for path in folder.glob("*.safetensors"):
        part = safetensors.numpy.load_file(path)
        part.setdefault(name, tensors[name] if equal else tensors[name] + 1)
        safetensors.numpy.save_file(part, path)
    listed = json.loads((folder / INDEX).read_text())["weight_map"][name]
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    if indexed:
        refused(folder, f"{name} is in both", *files, f"{INDEX} lists it in {listed}")
    else:
        (folder / INDEX).unlink()
        refused(folder, f"{name} is in both", *files)


def test_a_buffer_may_be_in_every_shard(tiny, tmp_path):
    config = tiny.config()
    folder = tiny.folder(tmp_path, config, tiny.tensors(config), shards=2)
    for path in folder.glob("*.safetensors"):
        part = safetensors.numpy.load_file(path)
        part["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
        safetensors.numpy.save_file(part, path)
    assert load(folder).size > 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("params.json", "Hugging Face version"),
        ("model_index.json", "a diffusers pipeline"),
        ("flax_model.msgpack", "Params.from_pytree"),
        ("tf_model.h5", "Keras"),
        ("model.onnx", "ONNX"),
        ("zero_to_fp32.py", "python zero_to_fp32.py"),
        ("__0_0.distcp", "save_pretrained"),
        ("checkpoint-500/config.json", "checkpoint-500 has a config.json"),
        ("snapshots/0123abcd/config.json", "snapshots/0123abcd"),
    ],
)
def test_a_folder_of_another_kind_is_named(tmp_path, name, expected):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}")
    refused(tmp_path, "no config.json", expected)
