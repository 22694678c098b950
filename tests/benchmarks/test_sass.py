"""Parsing of machine code into instructions and loops, and the static bound of a loop."""

from collections import Counter

import pytest

from benchmarks._gpu import bound, sass
from benchmarks._gpu.topology import Target


def listing(*lines: str) -> str:
    """Return the output of nvdisasm for these instructions and labels."""
    code = (
        line if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line} ;"
        for i, line in enumerate(lines)
    )
    return "\n".join(code)


NESTED = listing(
    "S2R R0, SR_TID.X",
    ".L_x_1:",
    "IADD3 R1, R1, 0x1, RZ",
    ".L_x_2:",
    "HMMA.16816.F32 R4, R8, R12, R4",
    "@P0 BRA `(.L_x_2)",
    "FADD R2, R2, R3",
    "@!P1 BRA `(.L_x_1)",
    "EXIT",
    ".L_x_3:",
    "BRA `(.L_x_3)",
    "NOP",
)


def test_an_instruction_keeps_its_modifiers_and_its_guard():
    kernel = sass.parse(
        listing(
            "@!P2 LDGSTS.E.BYPASS.128 [R29+0x800], desc[UR12][R12.64]", "HGMMA.64x64x16.F32 R8, R4"
        ),
        "k",
    )
    assert [i.op for i in kernel.instructions] == ["LDGSTS.E.BYPASS.128", "HGMMA.64x64x16.F32"]
    assert [i.conditional for i in kernel.instructions] == [True, False]


def test_instructions_that_never_run_are_ignored():
    assert sass.parse(listing("@!PT LDS RZ, [RZ]", "EXIT"), "k").counts() == Counter({"EXIT": 1})


def test_loops_are_found_without_the_unreachable_trap():
    outer, inner = sass.parse(NESTED, "k").loops
    assert outer.contains(inner) and not inner.contains(outer)
    kernel = sass.parse(NESTED, "k")
    assert kernel.counts(inner) == Counter({"HMMA.16816.F32": 1, "BRA": 1})
    assert kernel.counts(outer) == Counter({"HMMA.16816.F32": 1, "BRA": 2, "IADD3": 1, "FADD": 1})


def test_the_hot_loop_is_the_innermost_one_with_tensor_cores():
    assert sass.parse(NESTED, "k").hot_loops(containing=bound.TENSOR) == [
        Counter({"HMMA.16816.F32": 1, "BRA": 1})
    ]


def test_a_loop_around_one_without_tensor_cores_is_hot():
    text = listing(
        ".L_x_1:",
        "HMMA.16816.F32 R4",
        ".L_x_2:",
        "FADD R2",
        "@P0 BRA `(.L_x_2)",
        "@P1 BRA `(.L_x_1)",
        "EXIT",
    )
    (hot,) = sass.parse(text, "k").hot_loops(containing=bound.TENSOR)
    assert hot == Counter({"HMMA.16816.F32": 1, "FADD": 1, "BRA": 2})


def test_without_tensor_cores_the_longest_innermost_loop_is_hot():
    text = listing(
        ".L_x_1:", "@P0 BRA `(.L_x_1)", ".L_x_2:", "FADD R2", "@P1 BRA `(.L_x_2)", "EXIT"
    )
    assert sass.parse(text, "k").hot_loops(containing=bound.TENSOR) == [
        Counter({"FADD": 1, "BRA": 1})
    ]
    assert sass.parse(listing("FADD R2", "EXIT"), "k").hot_loops(containing=bound.TENSOR) == [
        Counter({"FADD": 1, "EXIT": 1})
    ]


def test_out_of_line_code_belongs_to_the_loop_that_runs_it():
    text = listing(
        ".L_x_1:",
        "@P2 BRA `(.L_x_8)",
        ".L_x_7:",
        "@P0 BRA `(.L_x_1)",
        "EXIT",
        ".L_x_8:",
        "MUFU.EX2 R1",
        "BRA `(.L_x_7)",
    )
    (loop,) = sass.parse(text, "k").loops
    assert sass.parse(text, "k").counts(loop) == Counter({"BRA": 3, "MUFU.EX2": 1})


def test_loops_can_exit_by_a_call_or_by_a_predicate_among_the_operands():
    """ptxas for A100 exits loops by `CALL.REL.NOINC`. Only it reaches the second loop."""
    text = listing(
        ".L_x_1:",
        "@!P2 CALL.REL.NOINC `(.L_x_3)",
        "BRA `(.L_x_1)",
        ".L_x_3:",
        "FADD R2",
        ".L_x_4:",
        "FMUL R2",
        "BRA.U UP0, `(.L_x_4)",
        "EXIT",
    )
    kernel = sass.parse(text, "k")
    assert [kernel.counts(loop) for loop in kernel.loops] == [
        Counter({"CALL.REL.NOINC": 1, "BRA": 1}),
        Counter({"FMUL": 1, "BRA.U": 1}),
    ]


def test_diverged_warps_are_not_counted():
    text = listing(
        ".L_x_1:",
        "BRA.DIV UR4, `(.L_x_8)",
        ".L_x_7:",
        "@P0 BRA `(.L_x_1)",
        "EXIT",
        ".L_x_8:",
        "SHFL.BFLY R1",
        "BRA `(.L_x_7)",
    )
    (loop,) = sass.parse(text, "k").loops
    assert sass.parse(text, "k").counts(loop) == Counter({"BRA.DIV": 1, "BRA": 1})


def test_one_of_several_kernels_is_parsed():
    text = (
        "\n//----- one\n.text.one:\n"
        + listing("FADD R1", "EXIT")
        + "\n//----- two\n.text.two:\n"
        + listing("FMUL R1", "EXIT")
    )
    assert sass.parse(text, "one").counts() == Counter({"FADD": 1, "EXIT": 1})
    assert sass.parse(text, "two").counts() == Counter({"FMUL": 1, "EXIT": 1})


@pytest.mark.parametrize(
    ("op", "count"),
    [
        ("HMMA.16816.F32", 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 16 * 8 * 8),
        ("HGMMA.64x128x16.F32", 64 * 128 * 16 // 4),
    ],
)
def test_multiply_adds_are_those_of_one_warp(op, count):
    assert bound.multiply_adds(op) == count


@pytest.mark.parametrize(
    ("op", "pipe", "took"),
    [
        ("FADD", "float", 4 / 4),
        ("PRMT", "logic", 4 / 2),
        ("IMAD.MOV.U32", "integer multiply", 4 / 2),
        ("MUFU.EX2", "special functions", 4 * 2),
        ("F2F.BF16.F32", "special functions", 4 * 2),
        ("LDS.U8", "shared memory", 4 * 1),
        ("LDS.64", "shared memory", 4 * 2),
        ("LDGSTS.E.BYPASS.128", "shared memory", 4 * 4),
        ("LDSM.16.MT88.4", "shared memory", 4 * 4),
        ("SHFL.BFLY", "shared memory", 4 * 1),
        ("HMMA.16816.F32", "tensor", 4 * 2048 / 1024),
        ("HMMA.1688.F32.TF32", "tensor", 4 * 1024 / 512),
        ("HGMMA.64x128x16.F32", "tensor", 64 * 128 * 16 / 2048),
    ],
)
def test_each_instruction_is_counted_in_its_pipe(op, pipe, took):
    """Clocks of four warps on an H100: 32 lanes over the lanes per clock of each pipe."""
    spent = bound.clocks(Counter({op: 1}), warps=4, target=Target.h100())
    assert spent.pop("issue") == 1
    assert {name: clocks for name, clocks in spent.items() if clocks} == {pipe: took}


def test_waiting_for_copies_does_not_use_shared_memory():
    assert not bound.clocks(Counter({"LDGDEPBAR": 1}), warps=4, target=Target.h100())[
        "shared memory"
    ]


def test_the_streaming_bound_is_bytes_copied_over_the_busiest_pipe():
    """32 clocks for 512 bytes of a warp: 16 bytes per clock on 132 multiprocessors at 1.755 GHz."""
    counts = Counter({"LDGSTS.E.BYPASS.128": 1, "MUFU.EX2": 16})
    found = bound.streaming_bound(counts, warps=1, target=Target.h100())
    assert found.limit == "special functions"
    assert found.fraction == pytest.approx(16 * 132 * 1.755e9 / 3.35232e12)
    assert bound.streaming_bound(
        counts, warps=1, target=Target.h100(), used=0.75
    ).fraction == pytest.approx(0.75 * found.fraction)
    assert bound.streaming_bound(Counter({"FADD": 1}), warps=1, target=Target.h100()) is None


def test_the_matmul_bound_is_relative_to_the_fastest_tensor_instruction():
    assert bound.matmul_bound(
        Counter({"HMMA.16816.F32": 1}), warps=4, target=Target.h100()
    ).fraction == pytest.approx(0.5)
    assert bound.matmul_bound(
        Counter({"HMMA.16816.F32": 1}), warps=4, target=Target.a100()
    ).fraction == pytest.approx(1.0)
    # Half the rate, and three TF32 products per float32 product.
    assert bound.matmul_bound(
        Counter({"HMMA.1688.F32.TF32": 1}), warps=4, target=Target.a100()
    ).fraction == pytest.approx(1 / 6)
    assert bound.matmul_bound(Counter({"FADD": 1}), warps=4, target=Target.h100()) is None


def test_targets_read_their_configs():
    h100, a100 = Target.h100(), Target.a100()
    assert (h100.architecture, a100.architecture) == ("sm_90a", "sm_80")
    assert h100.device_kind == "NVIDIA H100 80GB HBM3"
    assert (h100.figure("core_count"), a100.figure("core_count")) == (132, 108)
