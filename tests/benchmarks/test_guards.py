"""Each guard fails on what it is there for, and on nothing else."""

from collections import Counter

import pytest

from benchmarks._gpu.guards import Wants, in_code, in_memory, in_registers

GOOD = {
    "LDGSTS.E.BYPASS.128": 8, "LDS.128": 8, "LDSM.16.MT88.4": 8, "LDG.E.CONSTANT": 2, "F2FP.F16.E4M3.UNPACK_B": 64, "PRMT": 4,
    "HMMA.16816.F32": 32, "BRA": 1,
}  # fmt: skip
POOL = 8192 * 8 * 64 * 128


def code(*, wants: Wants | None = None, without: str = "", **extra: int) -> list[str]:
    """Faults of a good loop that has lost instructions or gained some; `__` stands for a dot."""
    counts = {op: n for op, n in GOOD.items() if not (without and op.startswith(without))}
    counts |= {op.replace("__", "."): n for op, n in extra.items()}
    return list(in_code([Counter(counts)], wants or Wants()))


def memory(hlo: str = "", **changed) -> list[str]:
    given = {
        "temporary_bytes": 1 << 20,
        "aliased_bytes": 2 * POOL,
        "pool_bytes": [POOL, POOL],
        "written": True,
    } | changed
    inside = "%fused (p: u8[8192,8,64,128]) -> f32[8192,8,64,128] {\n  %x = f32[8192,8,64,128] convert(%p)\n}"  # in registers
    return list(in_memory(f"{inside}\nENTRY %main {{\n{hlo}\n}}", **given))


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


def test_as_many_narrow_ones_as_the_exponents_need_pass():
    assert code(wants=Wants(narrow=3), LDG__E__U8=3) == []
    assert code(wants=Wants(narrow=3), LDG__E__U8=4) == [
        "4 loads and stores of one or two bytes; 3 allowed"
    ]


@pytest.mark.parametrize("op", ["F2F__BF16__F32", "F2F__F32__F16"])
def test_slow_conversions_fail(op):
    assert code(**{op: 2}) == ["2 conversions on the slow pipe (F2F); 0 allowed"]
    assert code(wants=Wants(slow_conversions=2), **{op: 2}) == []


def test_attending_without_tensor_cores_fails():
    assert code(without="HMMA") == ["no tensor core instruction"]
    assert code(without="HMMA", HGMMA__64x64x16__F32=1) == []
    assert code(without="HMMA", wants=Wants(attends=False)) == []


def test_attending_without_wide_asynchronous_copies_fails():
    assert code(without="LDGSTS") == ["no asynchronous copy of 16 bytes"]
    assert code(without="LDGSTS", LDGSTS__E=8) == ["no asynchronous copy of 16 bytes"]
    assert code(without="LDGSTS", wants=Wants(attends=False)) == []


def test_each_of_several_hot_loops_is_held_to_all_of_it():
    assert list(in_code([Counter(GOOD), Counter({"HMMA.16816.F32": 1})], Wants())) == [
        "no asynchronous copy of 16 bytes"
    ]


def test_more_spills_than_are_allowed_beside_the_loop_fail():
    assert list(in_registers(40, 28, Wants())) == ["spills 40 bytes, reloads 28; 64 allowed"]
    assert list(in_registers(40, 28, Wants(spilled_bytes=68))) == []


@pytest.mark.parametrize("op", ["LDL", "LDL__LU", "STL__64"])
def test_a_single_spilled_register_in_the_hot_loop_fails(op):
    assert list(in_registers(4, 4, Wants())) == []
    assert code(**{op: 1}) == ["1 moves of spilled registers; 0 allowed"]
    assert code(wants=Wants(spill_moves=1), **{op: 1}) == []


def test_a_step_that_writes_as_much_as_a_pool_fails_whatever_it_is():
    assert memory("  %copy.1 = u8[8192,8,64,128]{3,2,1,0} copy(%p)") == [
        "writes u8[8192,8,64,128] beside the kernel (copy)"
    ]
    assert memory("  ROOT %f = bf16[4096,8,64,128]{3,2,1,0} fusion(%p), kind=kLoop") == [
        "writes bf16[4096,8,64,128] beside the kernel (fusion)"
    ]
    assert memory("  %c = (u8[8192,65536]{1,0}, u8[8192,65536]{1,0}, u32[]) copy-start(%p)") == [
        "writes u8[8192,65536] beside the kernel (copy-start)"
    ]


def test_kernels_views_and_small_steps_pass():
    assert memory(
        """  %p = u8[8192,8,64,128]{3,2,1,0} parameter(0)
  %b = f8e4m3fn[8192,8,64,128]{3,2,1,0} bitcast(%p)
  %kv_write.3 = (u8[8192,8,64,128]{3,2,1,0}, u8[8192,8,64,128]{3,2,1,0}) custom-call(%p, %q)
  %copy.1 = bf16[64,32,128]{2,1,0} copy(%q)
  ROOT %copy.2 = s32[] copy(%r)"""
    ) == []  # fmt: skip


def test_memory_for_another_pool_fails():
    assert memory(temporary_bytes=POOL) == [
        f"needs {POOL} bytes beside its arguments: as much as a pool"
    ]


def test_a_pool_that_is_written_but_not_in_place_fails():
    assert memory(aliased_bytes=POOL) == [f"updates {POOL} of {2 * POOL} bytes in place"]
    assert memory(aliased_bytes=0, written=False) == []
