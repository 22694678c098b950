"""Recognize weights that were saved from an adapter or a wrapped module, by their names."""

from collections.abc import Iterable
from pathlib import Path

from jfp8kv.core.errors import CheckpointError

MERGE_ADVICE = (
    "Merge it into its base model with PEFT: AutoPeftModelForCausalLM.from_pretrained(adapter)"
    ".merge_and_unload().save_pretrained(new_folder)."
)
# By a component of a tensor name: what saved it, and how to save the model inside.
_WRAPPERS = {
    "_orig_mod": ("torch.compile", "save model._orig_mod"),
    "module": ("DataParallel, DistributedDataParallel or DeepSpeed", "save model.module"),
    "_fsdp_wrapped_module": ("FSDP", "save a full state dict"),
    "_flat_param": ("FSDP", "save a full state dict"),
    "_checkpoint_wrapped_module": ("activation checkpointing", "save the module inside"),
}
_ADAPTER_PARTS = frozenset(
    (
        "base_layer",
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
        "modules_to_save",
        "ia3_l",
        "hada_w1_a",
        "lokr_w1",
        "prompt_embeddings",
    )
)


def check_saved_names(names: Iterable[str], *, where: Path | str) -> None:
    """Raise `CheckpointError` for tensors of an adapter or of a wrapped module, by their names."""
    for name in names:
        parts = name.split(".")
        if not _ADAPTER_PARTS.isdisjoint(parts) or name.startswith("base_model.model."):
            raise CheckpointError(f"{where}: {name} is a tensor of an adapter. {MERGE_ADVICE}")
        for part in parts:
            if part in _WRAPPERS:
                wrapper, advice = _WRAPPERS[part]
                raise CheckpointError(
                    f"{where}: {name} has '{part}.' in its name, because it was saved from a "
                    f"module wrapped by {wrapper}: {advice} instead, or rename the tensors without "
                    "it."
                )
