"""Each guard reports its faults and nothing else."""

from collections import Counter

import pytest

from benchmarks._gpu.guards import Expectations, code_faults, memory_faults, register_faults

GOOD = {
    "LDGSTS.E.BYPASS.128": 8,
    "LDS.128": 8,
    "LDSM.16.MT88.4": 8,
    "LDG.E.CONSTANT": 2,
    "F2FP.F16.E4M3.UNPACK_B": 64,
    "PRMT": 4,
    "HMMA.16816.F32": 32,
    "BRA": 1,
}
POOL = 8192 * 8 * 64 * 128


def code(*, allowed: Expectations | None = None, without: str = "", **extra: int) -> list[str]:
    """Return the faults of a good loop with fewer or more instructions; `__` means a dot."""
    counts = {op: n for op, n in GOOD.items() if not (without and op.startswith(without))}
    counts |= {op.replace("__", "."): n for op, n in extra.items()}
    return list(code_faults([Counter(counts)], allowed or Expectations()))


def memory(hlo: str = "", **changed) -> list[str]:
    given = {
        "temporary_bytes": 1 << 20,
        "aliased_bytes": 2 * POOL,
        "pool_bytes": [POOL, POOL],
        "written": True,
    } | changed
    # Arrays inside a fusion are in registers.
    inside = "%fused (p: u8[8192,8,64,128]) -> f32[8192,8,64,128] {\n"
    inside += "  %x = f32[8192,8,64,128] convert(%p)\n}"
    return list(memory_faults(f"{inside}\nENTRY %main {{\n{hlo}\n}}", **given))


def test_a_good_loop_passes():
    assert code() == []


@pytest.mark.parametrize(
    "op",
    [
        "LDS__U8",
        "LDS__S8",
        "LDG__E__U8__CONSTANT",
        "LDG__E__U16",
        "LD__E__U8",
        "LDS__U__U16",
        "STG__E__U8",
    ],
)
def test_loads_and_stores_of_one_or_two_bytes_fail(op):
    assert code(**{op: 3}) == ["3 loads and stores of one or two bytes; 0 allowed"]


def test_as_many_narrow_accesses_as_exponents_need_pass():
    assert code(allowed=Expectations(narrow=3), LDG__E__U8=3) == []
    assert code(allowed=Expectations(narrow=3), LDG__E__U8=4) == [
        "4 loads and stores of one or two bytes; 3 allowed"
    ]


@pytest.mark.parametrize("op", ["F2F__BF16__F32", "F2F__F32__F16"])
def test_slow_conversions_fail(op):
    assert code(**{op: 2}) == ["2 conversions on the slow pipe (F2F); 0 allowed"]
    assert code(allowed=Expectations(slow_conversions=2), **{op: 2}) == []


def test_attention_without_tensor_cores_fails():
    assert code(without="HMMA") == ["no tensor core instruction"]
    assert code(without="HMMA", HGMMA__64x64x16__F32=1) == []
    assert code(without="HMMA", allowed=Expectations(attention=False)) == []


def test_attention_without_wide_asynchronous_copies_fails():
    assert code(without="LDGSTS") == ["no asynchronous copy of 16 bytes"]
    assert code(without="LDGSTS", LDGSTS__E=8) == ["no asynchronous copy of 16 bytes"]
    assert code(without="LDGSTS", allowed=Expectations(attention=False)) == []


def test_each_of_several_hot_loops_is_checked():
    assert list(code_faults([Counter(GOOD), Counter({"HMMA.16816.F32": 1})], Expectations())) == [
        "no asynchronous copy of 16 bytes"
    ]


def test_too_many_spills_outside_the_loop_fail():
    assert list(register_faults(40, 28, Expectations())) == [
        "spills 40 bytes, reloads 28; 64 allowed"
    ]
    assert list(register_faults(40, 28, Expectations(spilled_bytes=68))) == []


@pytest.mark.parametrize("op", ["LDL", "LDL__LU", "STL__64"])
def test_a_single_spilled_register_in_the_hot_loop_fails(op):
    assert list(register_faults(4, 4, Expectations())) == []
    assert code(**{op: 1}) == ["1 moves of spilled registers; 0 allowed"]
    assert code(allowed=Expectations(spill_moves=1), **{op: 1}) == []


def test_any_operation_that_writes_as_much_as_a_pool_fails():
    assert memory("  %copy.1 = u8[8192,8,64,128]{3,2,1,0} copy(%p)") == [
        "writes u8[8192,8,64,128] outside the kernel (copy)"
    ]
    assert memory("  ROOT %f = bf16[4096,8,64,128]{3,2,1,0} fusion(%p), kind=kLoop") == [
        "writes bf16[4096,8,64,128] outside the kernel (fusion)"
    ]
    assert memory("  %c = (u8[8192,65536]{1,0}, u8[8192,65536]{1,0}, u32[]) copy-start(%p)") == [
        "writes u8[8192,65536] outside the kernel (copy-start)"
    ]


def test_kernels_views_and_small_operations_pass():
    assert memory(
        """  %p = u8[8192,8,64,128]{3,2,1,0} parameter(0)
  %b = f8e4m3fn[8192,8,64,128]{3,2,1,0} bitcast(%p)
  %kv_write.3 = (u8[8192,8,64,128]{3,2,1,0}, u8[8192,8,64,128]{3,2,1,0}) custom-call(%p, %q)
  %copy.1 = bf16[64,32,128]{2,1,0} copy(%q)
  ROOT %copy.2 = s32[] copy(%r)"""
    ) == []  # fmt: skip


def test_temporary_memory_as_large_as_a_pool_fails():
    assert memory(temporary_bytes=POOL) == [
        f"needs {POOL} bytes in addition to its arguments: as much as a pool"
    ]


def test_a_written_pool_that_is_not_updated_in_place_fails():
    assert memory(aliased_bytes=POOL) == [f"updates {POOL} of {2 * POOL} bytes in place"]
    assert memory(aliased_bytes=0, written=False) == []
