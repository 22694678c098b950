"""MXFP4 as the published GPT-OSS files keep their experts: 32 four-bit numbers to a power of two.

`[experts, in, out]` becomes `blocks` uint8 `[experts, out, in / 32, 16]` and `scales` uint8
`[experts, out, in / 32]`; two numbers to a byte, the earlier one in the low half. Source: OCP
Microscaling Formats 1.0, section 5.
"""

import torch
from cases.case import Tensors

VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
PACKED = ("experts.gate_up_proj", "experts.down_proj")
BIAS = 127


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the nearest blocks and scales; a scale is that of the largest value of a block."""
    rows = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponent = (
        rows.abs().amax(-1).log2().floor() - 2
    )  # 4 to 8 of the largest: those past 6 are clipped
    scaled = rows / exponent.exp2()[..., None]
    code = (scaled.abs()[..., None] - VALUES).abs().argmin(-1) + 8 * (scaled < 0)
    blocks = code[..., 0::2] | code[..., 1::2] << 4
    return blocks.to(torch.uint8), (exponent + BIAS).to(torch.uint8)


def unpack(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`[experts, in, out]`, bfloat16: every number of the format times a power of two is one."""
    code = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
    number = VALUES[code % 8] * (1 - 2 * (code // 8))
    value = number * (scales.float() - BIAS).exp2()[..., None]
    return value.flatten(-2).transpose(1, 2).contiguous().to(torch.bfloat16)


def with_packed_experts(tensors: Tensors) -> Tensors:
    found: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(PACKED):
            found[name + "_blocks"], found[name + "_scales"] = pack(tensor)
        else:
            found[name] = tensor
    return found
