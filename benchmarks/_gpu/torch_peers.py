"""A decode by one of PyTorch's kernels, in a process of its own: `python -m benchmarks._gpu.torch_peers NAME JSON`.

Imports and compiles, prints `ready`, waits for a line, and prints a JSON row for each thing it timed, by CUDA events over calls
that take turns among copies of the data. What it computes is checked against plain attention in float32 for one request.
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
    name, given = sys.argv[1], json.loads(sys.argv[2])
    try:
        torch = importlib.import_module("torch")
        device = "cpu" if given["dry_run"] else "cuda"
        torch.manual_seed(0)
        peers = list(PEERS[name](torch, given, device))
        sets = data(torch, given, device)
        made = [
            (what, prepare, call, warm(torch, given, sets, prepare, call))
            for what, prepare, call in peers
        ]
    except Exception as error:
        say({"what": name, "skipped": f"{type(error).__name__}: {error}".splitlines()[0][:300]})
        return
    print("ready", flush=True)
    sys.stdin.readline()
    for what, prepare, call, error in made:
        try:
            say(
                {
                    "what": what,
                    "shape": "peers",
                    **timed(torch, given, [prepare(one) for one in sets], call),
                    "error": error,
                }
            )
        except Exception as failed:
            say(
                {
                    "what": what,
                    "skipped": f"{type(failed).__name__}: {failed}".splitlines()[0][:300],
                }
            )


def say(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def data(torch: Any, s: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Queries, keys and values in bfloat16, in as many copies as exceed the L2 cache."""
    size = 2 * s["requests"] * s["length"] * s["kv_heads"] * s["head_dim"]

    def normal(*sizes: int) -> Any:
        return torch.randn(*sizes, device=device, dtype=torch.bfloat16)

    kv = (s["requests"], s["length"], s["kv_heads"], s["head_dim"])
    q = normal(s["requests"], s["q_heads"], s["head_dim"])
    return [
        {"q": q, "k": normal(*kv), "v": normal(*kv)}
        for _ in range(max(1, -(-s["rotation"] // size)))
    ]


def warm(
    torch: Any, s: dict[str, Any], sets: list[dict[str, Any]], prepare: Call, call: Call
) -> float:
    """Run once; the error of one request by its norm."""
    got = call(prepare(sets[0]))[0].reshape(s["q_heads"], s["head_dim"]).float()
    q, k, v = (sets[0][name][0].float() for name in "qkv")
    group = s["q_heads"] // s["kv_heads"]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    weights = torch.einsum("hd,nhd->hn", q, k).mul(s["head_dim"] ** -0.5).softmax(-1)
    want = torch.einsum("hn,nhd->hd", weights, v)
    error = float((got - want).norm() / want.norm())
    # FP8 keys and values, and FP8 queries and weights where a kernel multiplies them, are a few percent each.
    assert error < 0.2, f"it is off by {error:.2g}: not timed"
    return error


def timed(torch: Any, s: dict[str, Any], sets: list[Any], call: Call) -> dict[str, Any]:
    """Microseconds of a call."""
    seconds = []
    for _ in range(s["repeats"]):
        turns = [sets[i % len(sets)] for i in range(s["calls"])]
        if s["dry_run"]:
            began = time.perf_counter()
            for one in turns:
                call(one)
            seconds.append((time.perf_counter() - began) / len(turns))
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for one in turns:
            call(one)
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3 / len(turns))
    return {"us": statistics.median(seconds) * 1e6, "least_us": min(seconds) * 1e6, "by": "events"}


def sdpa(torch: Any, s: dict[str, Any], device: str) -> Iterator[tuple[str, Call, Call]]:
    """PyTorch's own, over keys and values side by side."""
    attend = torch.nn.functional.scaled_dot_product_attention
    yield (
        "torch SDPA, bfloat16",
        heads_first,
        lambda x: attend(x["q"], x["k"], x["v"], enable_gqa=True),
    )


def flex(torch: Any, s: dict[str, Any], device: str) -> Iterator[tuple[str, Call, Call]]:
    """Flex attention, compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = flex_attention if s["dry_run"] else torch.compile(flex_attention, dynamic=False)
    yield (
        "torch flex attention, bfloat16",
        heads_first,
        lambda x: attend(x["q"], x["k"], x["v"], enable_gqa=True),
    )


def heads_first(x: dict[str, Any]) -> dict[str, Any]:
    return {
        "q": x["q"][:, :, None],
        "k": x["k"].transpose(1, 2).contiguous(),
        "v": x["v"].transpose(1, 2).contiguous(),
    }


def fa3(torch: Any, s: dict[str, Any], device: str) -> Iterator[tuple[str, Call, Call]]:
    """FlashAttention 3 from the wheel fa3-fwd, whose build has no page tables: keys and values lie side by side."""
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
    """FlashInfer over pages, bfloat16 queries; FP8 or bfloat16 keys and values."""
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
            indptr, order, last, s["q_heads"], s["kv_heads"], s["head_dim"], s["page_size"], q_data_type=torch.bfloat16,
            kv_data_type=kv_type,
        )  # fmt: skip
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
