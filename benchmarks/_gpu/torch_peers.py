"""Time a decode with a PyTorch kernel: `python -m benchmarks._gpu.torch_peers NAME JSON`.

Imports and compiles, prints `ready`, waits for a line of input, and prints a JSON row per timing.
CUDA events measure calls that alternate between copies of the data. The output of one request is
compared with plain attention in float32.
"""

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Call = Callable[[dict[str, Any]], Any]


def main() -> None:
    """Run the peer that the command line names."""
    name, given = sys.argv[1], json.loads(sys.argv[2])
    try:
        torch = importlib.import_module("torch")
        device = "cpu" if given["dry_run"] else "cuda"
        torch.manual_seed(0)
        peers = list(PEERS[name](torch, given, device))
        sets = data(torch, given, device)
        checked = [
            (what, prepare, call, check(torch, given, sets, prepare, call))
            for what, prepare, call in peers
        ]
    except Exception as error:
        print_row({"what": name, "skipped": describe(error)})
        return
    print("ready", flush=True)
    sys.stdin.readline()
    for what, prepare, call, error in checked:
        try:
            figures = timed(torch, given, [prepare(inputs) for inputs in sets], call)
            print_row({"what": what, "shape": "peers", **figures, "error": error})
        except Exception as failed:
            print_row({"what": what, "skipped": describe(failed)})


def print_row(row: dict[str, Any]) -> None:
    """Print a row as JSON."""
    print(json.dumps(row), flush=True)


def describe(error: Exception) -> str:
    """Return the first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def data(torch: Any, s: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Return copies of queries, keys and values in bfloat16 that together exceed the L2 cache."""
    size = 2 * s["requests"] * s["length"] * s["kv_heads"] * s["head_dim"]

    def normal(*sizes: int) -> Any:
        return torch.randn(*sizes, device=device, dtype=torch.bfloat16)

    kv = (s["requests"], s["length"], s["kv_heads"], s["head_dim"])
    q = normal(s["requests"], s["q_heads"], s["head_dim"])
    return [
        {"q": q, "k": normal(*kv), "v": normal(*kv)}
        for _ in range(max(1, -(-s["rotation"] // size)))
    ]


def check(
    torch: Any, s: dict[str, Any], sets: list[dict[str, Any]], prepare: Call, call: Call
) -> float:
    """Run once and return the relative error of one request."""
    got = call(prepare(sets[0]))[0].reshape(s["q_heads"], s["head_dim"]).float()
    q, k, v = (sets[0][name][0].float() for name in "qkv")
    group = s["q_heads"] // s["kv_heads"]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    weights = torch.einsum("hd,nhd->hn", q, k).mul(s["head_dim"] ** -0.5).softmax(-1)
    want = torch.einsum("hn,nhd->hd", weights, v)
    error = float((got - want).norm() / want.norm())
    # FP8 keys, values, queries and weights have errors of a few percent each.
    assert error < 0.2, f"relative error of {error:.2g}: not timed"
    return error


def timed(torch: Any, s: dict[str, Any], sets: list[Any], call: Call) -> dict[str, Any]:
    """Return the microseconds per call."""
    seconds = []
    for _ in range(s["repeats"]):
        inputs = [sets[i % len(sets)] for i in range(s["calls"])]
        if s["dry_run"]:
            began = time.perf_counter()
            for x in inputs:
                call(x)
            seconds.append((time.perf_counter() - began) / len(inputs))
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for x in inputs:
            call(x)
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3 / len(inputs))
    return {"us": statistics.median(seconds) * 1e6, "min_us": min(seconds) * 1e6, "clock": "events"}


def sdpa(torch: Any, s: dict[str, Any], device: str) -> Iterator[tuple[str, Call, Call]]:
    """Yield PyTorch's attention over contiguous keys and values."""
    attend = torch.nn.functional.scaled_dot_product_attention
    yield (
        "torch SDPA, bfloat16",
        heads_first,
        lambda x: attend(x["q"], x["k"], x["v"], enable_gqa=True),
    )


def flex(torch: Any, s: dict[str, Any], device: str) -> Iterator[tuple[str, Call, Call]]:
    """Yield compiled flex attention."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = flex_attention if s["dry_run"] else torch.compile(flex_attention, dynamic=False)
    yield (
        "torch flex attention, bfloat16",
        heads_first,
        lambda x: attend(x["q"], x["k"], x["v"], enable_gqa=True),
    )


def heads_first(x: dict[str, Any]) -> dict[str, Any]:
    """Return inputs with heads before tokens."""
    return {
        "q": x["q"][:, :, None],
        "k": x["k"].transpose(1, 2).contiguous(),
        "v": x["v"].transpose(1, 2).contiguous(),
    }


def fa3(torch: Any, s: dict[str, Any], device: str) -> Iterator[tuple[str, Call, Call]]:
    """Yield FlashAttention 3 over contiguous keys and values: fa3-fwd has no page tables."""
    from fa3_fwd_interface import flash_attn_with_kvcache

    lengths = torch.full((s["requests"],), s["length"], device=device, dtype=torch.int32)

    def bfloat16(x: dict[str, Any]) -> dict[str, Any]:
        return {"q": x["q"][:, None], "k": x["k"], "v": x["v"]}

    def fp8(x: dict[str, Any]) -> dict[str, Any]:
        return {name: part.to(torch.float8_e4m3fn) for name, part in bfloat16(x).items()}

    def call(x: dict[str, Any]) -> Any:
        return flash_attn_with_kvcache(x["q"], x["k"], x["v"], cache_seqlens=lengths)

    yield "fa3, bfloat16", bfloat16, call
    yield "fa3, FP8", fp8, call


def flashinfer(torch: Any, s: dict[str, Any], device: str) -> Iterator[tuple[str, Call, Call]]:
    """Yield FlashInfer over pages, with bfloat16 queries and FP8 or bfloat16 keys and values."""
    import flashinfer as library

    pages = -(-s["length"] // s["page_size"])

    def planned(kv_type: Any) -> Any:
        workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True
        )
        indptr = torch.arange(0, s["requests"] * pages + 1, pages, dtype=torch.int32, device=device)
        order = torch.arange(s["requests"] * pages, dtype=torch.int32, device=device)
        last = torch.full(
            (s["requests"],),
            s["length"] - (pages - 1) * s["page_size"],
            dtype=torch.int32,
            device=device,
        )
        wrapper.plan(
            indptr,
            order,
            last,
            s["q_heads"],
            s["kv_heads"],
            s["head_dim"],
            s["page_size"],
            q_data_type=torch.bfloat16,
            kv_data_type=kv_type,
        )
        return wrapper

    def paged(x: dict[str, Any], kv_type: Any) -> dict[str, Any]:
        size = (-1, s["page_size"], s["kv_heads"], s["head_dim"])
        return {"q": x["q"], "kv": tuple(x[name].to(kv_type).reshape(size) for name in "kv")}

    for name, kv_type in (("FP8", torch.float8_e4m3fn), ("bfloat16", torch.bfloat16)):
        wrapper = planned(kv_type)
        yield (
            f"flashinfer, {name}",
            lambda x, kv_type=kv_type: paged(x, kv_type),
            lambda x, wrapper=wrapper: wrapper.run(x["q"], x["kv"]),
        )


PEERS: dict[str, Any] = {"sdpa": sdpa, "flex": flex, "fa3": fa3, "flashinfer": flashinfer}

if __name__ == "__main__":
    main()
