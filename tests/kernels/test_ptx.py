"""What Triton makes of the kernels of triton_kernels/: bench/ptx.py holds it against what must be, here it is run, and
shown what it must refuse. Needs no GPU; compiles in other processes. Run by pytest.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import ptx, sass

ROOT = Path(__file__).resolve().parents[2]

KERNELS = [
    f"sgd_kernel<{', '.join(part for part in (storage, numerics, strided) if part)}>"
    for storage, all_numerics in {
        "float32": ("",),
        "float64": ("",),
        "float16": ("torch", "opmath"),
        "bfloat16": ("torch", "opmath"),
    }.items()
    for numerics in all_numerics
    for strided in ("", "strided")
]

WITH_OPTIONS = [
    "sgd_kernel<float32, options, averages>",
    "sgd_kernel<bfloat16, opmath, options, full, momentum float32, average float32, averages>",
    "sgd_kernel<bfloat16, opmath, options, split>",
    "sgd_kernel<bfloat16, opmath, options, momentum int8, stochastic>",
    "norm_kernel<float32>",
]

# What sgd_kernel<float32> needs: 2,048 elements a tile and 512 a piece, 16 and 4 a thread of 128, 8 and 2 of AMD's 256.
OF_FLOAT32 = ptx.Needed(wide_loads=12, wide_stores=8, multiply_adds=80, products=40, in_double=False, warps=4, blocks=6)
OF_FLOAT32_BY_AMD = dataclasses.replace(OF_FLOAT32, wide_loads=6, wide_stores=4, multiply_adds=40, products=20)


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton: pip install triton")
    try:
        sass.cuobjdump()
    except sass.Missing as missing:
        pytest.skip(str(missing))


def run(*arguments: str | Path) -> str:
    """The standard output of another Python."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stdout


# --- what is shipped ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    return run("-m", "bench.ptx", "--keep", folder)


def test_every_kernel_is_as_it_must_be(printed: str) -> None:
    targets = re.findall(r"^(sm_\d+|gfx\d+)\nkernel .*\n((?:\w+_kernel.*\n)+)", printed, re.MULTILINE)
    assert [target for target, _ in targets] == ["sm_80", "sm_90", "sm_100", "gfx942"]
    for target, rows in targets:
        others = [] if target == "sm_100" else WITH_OPTIONS
        assert re.findall(r"^\w+_kernel<.*?>", rows, re.MULTILINE) == KERNELS + others
    assert printed.endswith(f"\n{4 * len(KERNELS) + 3 * len(WITH_OPTIONS)} kernels are as they must be\n")


# --- the check itself: one rule after another broken in code that is right ------------------------------------------


@pytest.fixture(scope="module")
def ptx_text(printed: str, folder: Path) -> str:
    return (folder / "sm_90-sgd-kernel-float32.ptx").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def code(ptx_text: str, folder: Path) -> ptx.Nvidia:
    return ptx.read_nvidia(ptx_text, folder / "sm_90-sgd-kernel-float32.cubin")


def test_the_right_code_has_no_faults(code: ptx.Nvidia) -> None:
    assert list(code.faults(OF_FLOAT32)) == []


@pytest.mark.parametrize(
    ("right", "wrong", "faults"),
    [
        (
            "fma.rn.f32",
            "fma.rz.f32",
            [
                "1 multiply-adds not rounded to nearest (fma.rz.f32), none is allowed",
                "79 fused multiply-adds, it must be 80",
            ],
        ),
        (
            "fma.rn.f32",
            "mad.rn.f32",
            [
                "1 multiply-adds not rounded to nearest (mad.rn.f32), none is allowed",
                "79 fused multiply-adds, it must be 80",
            ],
        ),
        (
            "fma.rn.f32",
            "add.rn.f32",
            [
                "1 additions, which a compiler could fuse (add.rn.f32), none is allowed",
                "79 fused multiply-adds, it must be 80",
            ],
        ),
        (
            "mul.rn.f32",
            "sub.f32",
            [
                "1 additions, which a compiler could fuse (sub.f32), none is allowed",
                "39 multiplications, it must be 40",
            ],
        ),
        (
            "mul.rn.f32",
            "mul.f32",
            [
                "1 multiplications without .rn, which a compiler could fuse (mul.f32), none is allowed",
                "39 multiplications, it must be 40",
            ],
        ),
        ("mul.rn.f32", "fma.rn.f32", ["81 fused multiply-adds, it must be 80", "39 multiplications, it must be 40"]),
        ("mul.rn.f32", "mul.rn.f32x2", ["41 multiplications, it must be 40"]),
        ("fma.rn.f32", "fma.rn.f32x2", ["81 fused multiply-adds, it must be 80"]),
        ("mul.rn.f32", "mul.rn.ftz.f32", ["1 instructions that flush to zero (mul.rn.ftz.f32), none is allowed"]),
        (
            "div.rn.f32",
            "div.full.f32",
            [
                "1 divisions not rounded to nearest (div.full.f32), none is allowed",
                "1 approximations (div.full.f32), none is allowed",
            ],
        ),
        ("neg.f32", "rcp.approx.f32", ["1 approximations (rcp.approx.f32), none is allowed"]),
        (
            "neg.f32",
            "cvt.rz.bf16.f32",
            ["1 instructions with floats that the step has no use for (cvt.rz.bf16.f32), none is allowed"],
        ),
        (
            "fma.rn.f32",
            "fma.rn.bf16x2",
            [
                "1 instructions with floats that the step has no use for (fma.rn.bf16x2), none is allowed",
                "81 fused multiply-adds, it must be 80",  # it does two
            ],
        ),
        ("neg.f32", "cvt.f64.f32", ["1 FP64 instructions (cvt.f64.f32), none is allowed"]),
        ("ld.global.v4.b32", "ld.global.v2.b32", ["11 128-bit loads, it must be 12"]),
        ("ld.global.b32", "ld.global.v4.b32", ["13 128-bit loads, it must be 12"]),
        ("st.global.v4.b32", "st.global.b32", ["7 128-bit stores, it must be 8"]),
        ("st.global.b32", "st.local.b32", ["1 accesses to local memory (st.local.b32), none is allowed"]),
        ("ld.global.b32", "ld.shared.b32", ["1 accesses to shared memory (ld.shared.b32), none is allowed"]),
        (
            "ld.global.b32",
            "ld.shared::cta.b32",
            ["1 accesses to shared memory (ld.shared::cta.b32), none is allowed"],
        ),
        ("\tret;", "\t@%p1 bar.sync 0; ret;", ["1 barriers (bar.sync), none is allowed"]),
        ("\tret;", "\t{ call.uni (%r1), __nv_expf, (%r2); }\n\tret;", ["1 calls (call.uni), none is allowed"]),
        (
            "\t.reg .pred",
            "\t.local .align 16 .b8 \t__local_depot0[64];\n\t.reg .pred",
            ["1 variables in local memory, at most 0 are allowed"],
        ),
        (
            ".visible .entry",
            ".extern .shared .align 16 .b8 global_smem[];\n.visible .entry",
            ["1 variables in shared memory, at most 0 are allowed"],
        ),
        ("\tret;", "\tret; // begin; add.f32 %r1, %r2, %r3; end", []),
        (
            "\tret;",
            "\tmov.u64 %rd1, 0x0;\n\t.loc\t1 9 20 // x.py:9:20\n\t@%p1 ld.global.b64 { %rd1 }, [ %rd1 + 0 ];\n\tret;",
            ["1 loads from an address that was overwritten, it must be 0"],
        ),
        ("\tret;", "\tmov.u64 %rd1, 0x0;\n\tld.global.b64 { %rd1 }, [ %rd2 + 0 ];\n\tret;", []),
    ],
)
def test_ptx_that_breaks_a_rule_is_refused(
    code: ptx.Nvidia, ptx_text: str, right: str, wrong: str, faults: list[str]
) -> None:
    assert right in ptx_text
    text = ptx_text.replace(right, wrong, 1)
    broken = dataclasses.replace(
        code,
        opcodes=ptx.ptx_opcodes(text),
        variables=ptx.ptx_variables(text),
        lost_addresses=ptx.lost_addresses(text),
    )
    assert list(broken.faults(OF_FLOAT32)) == faults


# What sgd_kernel<float32, options, averages> needs: an average is one operand more, and its lerp two multiply-adds.
OF_OPTIONS = ptx.Needed(
    wide_loads=16, wide_stores=12, multiply_adds=142, products=80, in_double=False, warps=4, blocks=4, has_options=True
)


@pytest.mark.parametrize(
    ("right", "wrong", "faults"),
    [
        ("", "", []),
        (
            "sub.rn.f32",
            "sub.f32",
            ["1 additions without .rn, which a compiler could fuse (sub.f32), none is allowed"],
        ),
        (
            "div.rn.f32",
            "div.full.f32",
            [
                "1 divisions not rounded to nearest (div.full.f32), none is allowed",
                "1 approximations (div.full.f32), none is allowed",
            ],
        ),
        ("fma.rn.f32", "sub.rn.f32", ["141 fused multiply-adds, it must be 142"]),
        ("mul.rn.f32", "add.rn.f32", ["79 multiplications, it must be 80"]),
        ("sub.rn.f32", "sub.rn.f64", ["1 FP64 instructions (sub.rn.f64), none is allowed"]),
        ("ld.global.v4.b32", "ld.global.v2.b32", ["15 128-bit loads, it must be 16"]),
        ("st.global.v4.b32", "st.global.b32", ["11 128-bit stores, it must be 12"]),
        ("ld.global.b32", "ld.shared.b32", []),  # sums and largest magnitudes of a block
    ],
)
def test_ptx_with_options_that_breaks_a_rule_is_refused(
    printed: str, folder: Path, right: str, wrong: str, faults: list[str]
) -> None:
    stem = folder / "sm_90-sgd-kernel-float32-options-averages"
    text = stem.with_suffix(".ptx").read_text(encoding="utf-8")
    assert right in text
    code = ptx.read_nvidia(text.replace(right, wrong, 1), stem.with_suffix(".cubin"))
    assert list(code.faults(OF_OPTIONS)) == faults


@pytest.mark.parametrize(
    ("number", "value", "fault"),
    [
        ("registers", 81, "81 registers, at most 80 are allowed"),
        ("stack", 8, "8 bytes of stack, at most 0 are allowed"),
        ("local", 8, "8 bytes of local memory, at most 0 are allowed"),
        ("shared", 16, "16 bytes of shared memory, at most 0 are allowed"),
        ("loads_in_flight", 11, "11 128-bit loads in flight, at least 12 are needed"),
    ],
)
def test_machine_code_that_takes_too_much_is_refused(code: ptx.Nvidia, number: str, value: int, fault: str) -> None:
    assert list(dataclasses.replace(code, **{number: value}).faults(OF_FLOAT32)) == [fault]


def test_doubles_are_refused_only_where_floats_are_stepped(printed: str, folder: Path) -> None:
    opcodes = ptx.ptx_opcodes((folder / "sm_90-sgd-kernel-float64.ptx").read_text(encoding="utf-8"))
    code = ptx.Nvidia(opcodes, opcodes - opcodes, 0, 70, 0, 0, 0, loads_in_flight=12, instructions=1)
    of_float64 = dataclasses.replace(OF_FLOAT32, multiply_adds=40, products=20, in_double=True)
    assert list(code.faults(of_float64)) == []
    assert any("FP64" in fault for fault in code.faults(dataclasses.replace(of_float64, in_double=False)))


@pytest.mark.parametrize(
    ("registers", "warps"), [(16, 64), (32, 64), (40, 48), (80, 24), (81, 20), (128, 16), (129, 12), (255, 8)]
)
def test_warps_are_what_registers_leave_room_for(code: ptx.Nvidia, registers: int, warps: int) -> None:
    compiled = ptx.Compiled("k", "sm_90", dataclasses.replace(code, registers=registers), OF_FLOAT32)
    assert compiled.warps == warps


# --- the same of AMD's assembly --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def assembly(printed: str, folder: Path) -> str:
    return (folder / "gfx942-sgd-kernel-float32.s").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("right", "wrong", "faults"),
    [
        ("", "", []),
        (
            "v_fma_f32",
            "v_mad_f32",
            ["1 multiply-adds that round twice (v_mad_f32), none is allowed"],
        ),
        (
            "v_fmac_f32_e32",
            "v_add_f32_e32",
            ["1 additions, which a compiler could fuse (v_add_f32), none is allowed"],
        ),
        ("v_mul_f32_e32", "v_pk_mul_f16", ["1 operations in float16 (v_pk_mul_f16), none is allowed"]),
        ("v_mul_f32_e32", "v_mul_f64", ["1 FP64 instructions (v_mul_f64), none is allowed"]),
        ("global_load_dword ", "flat_load_dword ", ["1 generic accesses (flat_load_dword), none is allowed"]),
        ("global_load_dword ", "ds_read_b32 ", ["1 accesses to shared memory (ds_read_b32), none is allowed"]),
        (
            "global_load_dword ",
            "scratch_load_dword ",
            ["1 accesses to private memory (scratch_load_dword), none is allowed"],
        ),
        ("\ts_endpgm", "\ts_barrier\n\ts_endpgm", ["1 barriers (s_barrier), none is allowed"]),
        ("\ts_endpgm", "\ts_swappc_b64 s[30:31], s[4:5]\n\ts_endpgm", ["1 calls (s_swappc_b64), none is allowed"]),
        (
            "buffer_load_dwordx4",
            "buffer_load_dwordx2",
            ["5 128-bit loads, it must be 6", "5 128-bit loads in flight, at least 6 are needed"],
        ),
        ("buffer_store_dwordx4", "buffer_store_dword", ["3 128-bit stores, it must be 4"]),
        (
            "\tbuffer_load_dwordx4 ",
            "\tbuffer_load_dwordx4 v[12:15], v26, s[24:27], 0 offen\n\ts_waitcnt vmcnt(0) lgkmcnt(0)\n"
            "\tbuffer_load_dwordx2 ",
            ["5 128-bit loads in flight, at least 6 are needed"],
        ),
        ("float_denorm_mode_32 3", "float_denorm_mode_32 0", ["0 for float_denorm_mode_32, it must be 3"]),
        ("float_denorm_mode_16_64 3", "float_denorm_mode_16_64 1", ["1 for float_denorm_mode_16_64, it must be 3"]),
        ("float_round_mode_32 0", "float_round_mode_32 3", ["3 for float_round_mode_32, it must be 0"]),
        ("float_round_mode_16_64 0", "float_round_mode_16_64 3", ["3 for float_round_mode_16_64, it must be 0"]),
        (".vgpr_spill_count: 0", ".vgpr_spill_count: 3", ["3 spilled registers, at most 0 are allowed"]),
        (".sgpr_spill_count: 0", ".sgpr_spill_count: 3", ["3 spilled registers, at most 0 are allowed"]),
        (
            ".private_segment_fixed_size: 0",
            ".private_segment_fixed_size: 8",
            ["8 bytes of private memory, at most 0 are allowed"],
        ),
        (
            ".group_segment_fixed_size: 0",
            ".group_segment_fixed_size: 8",
            ["8 bytes of shared memory, at most 0 are allowed"],
        ),
    ],
)
def test_amd_assembly_that_breaks_a_rule_is_refused(assembly: str, right: str, wrong: str, faults: list[str]) -> None:
    assert right in assembly
    assert list(ptx.read_amd(assembly.replace(right, wrong, 1)).faults(OF_FLOAT32_BY_AMD)) == faults


def test_amd_registers_and_multiply_adds_are_counted(assembly: str) -> None:
    code = ptx.read_amd(assembly)
    assert list(code.faults(dataclasses.replace(OF_FLOAT32_BY_AMD, multiply_adds=code.multiply_adds))) == []
    more = dataclasses.replace(OF_FLOAT32_BY_AMD, multiply_adds=code.multiply_adds + 1)
    assert [fault.partition(",")[0] for fault in code.faults(more)] == [f"{code.multiply_adds} fused multiply-adds"]
    assert ptx.read_amd(assembly.replace("v_fma_f32", "v_pk_fma_f32", 1)).multiply_adds == code.multiply_adds + 1
    many = ptx.read_amd(re.sub(r"\.vgpr_count: +\d+", ".vgpr_count: 81", assembly))
    assert list(many.faults(OF_FLOAT32_BY_AMD)) == ["81 registers, at most 80 are allowed"]
    assert ptx.Compiled("k", "gfx942", many, OF_FLOAT32_BY_AMD).warps == 20


def test_assembly_that_does_not_tell_is_an_error(assembly: str) -> None:
    with pytest.raises(RuntimeError, match="the assembly does not tell vgpr_spill_count"):
        ptx.read_amd(assembly.replace(".vgpr_spill_count", ".spills"))


# --- the oldest Triton that is supported ---------------------------------------------------------------------------

OLDEST = "3.6.0"  # torch 2.11 comes with it

COMPILES_ALL = """
import sys
from pathlib import Path

import triton
from bench import ptx

print(triton.__version__, len(ptx.shipped(["sm_90"], Path(sys.argv[1]))["sm_90"]))
"""


def test_the_oldest_triton_compiles_every_kernel(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "old")]
    done = subprocess.run([*command, f"triton=={OLDEST}"], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"pip has no Triton {OLDEST} for this Python: {done.stderr[-200:]}")
    folders = [str(tmp_path / "old"), str(ROOT), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", COMPILES_ALL, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [OLDEST, str(len(KERNELS) + len(WITH_OPTIONS))]


# --- the same of kernels that Triton compiles: each does something that no kernel here may -------------------------

BAD = """
import dataclasses
import json
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.compiler import ASTSource

sys.path.insert(0, sys.argv[1])
from bench import ptx

FOLDER = Path(__file__).parent


@triton.jit
def formula(x, y, size: tl.constexpr):
    at = tl.arange(0, size)
    p, q = tl.load(x + at), tl.load(y + at)
    tl.store(y + at, p * q + p)


@triton.jit
def masked(x, y, size: tl.constexpr):
    at = tl.arange(0, size)
    p, q = tl.load(x + at), tl.load(y + at)
    tl.store(y + at, p, mask=q > 0)


@triton.jit
def in_double(x, y, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(y + at, (tl.load(x + at).to(tl.float64) * 1.1).to(tl.float32))


@triton.jit
def approximate(x, y, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(y + at, tl.exp(tl.load(x + at)) / tl.load(y + at))


@triton.jit
def one_after_another(x, y, size: tl.constexpr):
    for start in range(3):
        at = start * size + tl.arange(0, size)
        tl.store(y + at, tl.fma(tl.load(x + at), 2.0, 1.0))


@triton.jit
def keeps_much(x, y, size: tl.constexpr):
    at = tl.arange(0, size)
    p = tl.load(x + at)
    tl.store(y + at, p * tl.sum(p))


def faults(function, size=512, target="sm_90", aligned=True, fuse=False):
    types = {"x": "*fp32", "y": "*fp32", "size": "constexpr"}
    attributes = {(place,): [["tt.divisibility", 16]] for place in range(2 if aligned else 0)}
    made = triton.compile(
        ASTSource(function, types, {"size": size}, attributes),
        target=ptx.gpu_target(target),
        options={"num_warps": 4, "enable_fp_fusion": fuse},
    )
    must = ptx.Needed(3, 1, 0, 4, False, warps=4, blocks=6)
    return list(ptx.read(made, FOLDER / "code").faults(must))


json.dump(
    {
        "formula": faults(formula),
        "fused formula": faults(formula, fuse=True),
        "unaligned": faults(formula, aligned=False),
        "masked": faults(masked),
        "in_double": faults(in_double),
        "approximate": faults(approximate),
        "one_after_another": faults(one_after_another),
        "keeps_much": faults(keeps_much, size=32768),
        "keeps_much for AMD": faults(keeps_much, target="gfx942"),
        "needed": {
            f"{kernel.name} {lanes}": dataclasses.asdict(ptx.needed(kernel, lanes))
            for kernel in (*ptx._launcher().KERNELS, *ptx.with_options())
            for lanes in (32, 64)
        },
    },
    sys.stdout,
)
"""


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    script = tmp_path_factory.mktemp("bad") / "bad.py"
    script.write_text(BAD, encoding="utf-8")
    found: dict[str, Any] = json.loads(run(script, ROOT))
    return found


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("formula", "4 additions, which a compiler could fuse (add.rn.f32)"),
        ("fused formula", "4 fused multiply-adds, it must be 0"),  # nothing else tells these from wanted ones
        ("fused formula", "0 multiplications, it must be 4"),
        ("unaligned", "0 128-bit loads, it must be 3"),
        ("unaligned", "0 128-bit stores, it must be 1"),
        ("masked", "0 128-bit stores, it must be 1"),
        ("in_double", " FP64 instructions (cvt.f64.f32, cvt.rn.f32.f64, mul.rn.f64)"),
        ("approximate", " divisions not rounded to nearest (div.full.f32)"),
        ("approximate", " approximations (div.full.f32, ex2.approx.f32)"),
        ("one_after_another", "1 128-bit loads in flight, at least 3 are needed"),
        ("keeps_much", " accesses to shared memory (ld.shared.b32, "),
        ("keeps_much", " barriers (bar.sync)"),
        ("keeps_much", "255 registers, at most 80 are allowed"),
        ("keeps_much", " bytes of stack, at most 0 are allowed"),
        ("keeps_much", " bytes of shared memory, at most 0 are allowed"),
        ("keeps_much for AMD", " additions, which a compiler could fuse (v_add_f32"),
        ("keeps_much for AMD", " accesses to shared memory (ds_"),
        ("keeps_much for AMD", " barriers (s_barrier)"),
    ],
)
def test_a_bad_kernel_is_refused(bad: dict[str, Any], name: str, fault: str) -> None:
    assert any(fault in found for found in bad[name]), bad[name]


def test_what_a_kernel_needs_follows_from_its_tiles(bad: dict[str, Any]) -> None:
    found = {name: ptx.Needed(**numbers) for name, numbers in bad["needed"].items()}
    assert found["sgd_kernel<float32> 32"] == OF_FLOAT32
    assert found["sgd_kernel<float32> 64"] == OF_FLOAT32_BY_AMD
    # 512 elements a piece, 4 a thread, in one loop.
    assert found["sgd_kernel<bfloat16, torch, strided> 32"] == ptx.Needed(
        wide_loads=0, wide_stores=0, multiply_adds=16, products=8, in_double=False, warps=4, blocks=4
    )
    assert found["sgd_kernel<float64> 32"] == dataclasses.replace(
        OF_FLOAT32, multiply_adds=40, products=20, in_double=True
    )
    assert found["sgd_kernel<float32, options, averages> 32"] == OF_OPTIONS
    # 1,024 elements, 8 a thread, one vector of bfloat16; of AMD's 4, which is none.
    of_int8 = ptx.Needed(
        wide_loads=2, wide_stores=1, multiply_adds=52, products=60, in_double=False, warps=4, blocks=4, has_options=True
    )
    assert found["sgd_kernel<bfloat16, opmath, options, momentum int8, stochastic> 32"] == of_int8
    assert found["sgd_kernel<bfloat16, opmath, options, momentum int8, stochastic> 64"] == dataclasses.replace(
        of_int8, wide_loads=0, wide_stores=0, multiply_adds=27, products=30
    )
    assert found["norm_kernel<float32> 32"] == ptx.Needed(
        wide_loads=4, wide_stores=0, multiply_adds=0, products=66, in_double=True, warps=4, blocks=8,
        is_norm=True, has_options=True,
    )  # fmt: skip
    sgd_kernels = {name: must for name, must in found.items() if not re.search("norm|bf|options", name)}
    assert {name: must.registers for name, must in sgd_kernels.items() if name.endswith(" 32")} == {
        "sgd_kernel<float32> 32": 80,
        "sgd_kernel<float32, strided> 32": 80,
        "sgd_kernel<float64> 32": 80,
        "sgd_kernel<float64, strided> 32": 80,
        "sgd_kernel<float16, torch> 32": 128,
        "sgd_kernel<float16, torch, strided> 32": 128,
        "sgd_kernel<float16, opmath> 32": 128,
        "sgd_kernel<float16, opmath, strided> 32": 128,
    }


# --- what it tells ---------------------------------------------------------------------------------------------------


def test_faults_end_it_and_targets_that_triton_lacks_do_not(
    code: ptx.Nvidia, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = ptx.Compiled("kernel<1>", "sm_90", code, OF_FLOAT32)
    launcher = SimpleNamespace(triton=SimpleNamespace(__version__="1.2.3"))
    monkeypatch.setattr(ptx, "_launcher", lambda: launcher)
    monkeypatch.setattr(ptx, "can_compile", lambda target: target == "sm_90")
    monkeypatch.setattr(ptx, "shipped", lambda targets, folder: {target: [compiled] for target in targets})
    monkeypatch.setattr(sys, "argv", ["bench.ptx", "sm_90", "gfx942"])
    ptx.main()
    said = capsys.readouterr().out
    assert "\ngfx942\nthis Triton cannot compile for it\n" in said
    assert said.endswith("\n1 kernels are as they must be\n")
    compiled = dataclasses.replace(compiled, code=dataclasses.replace(code, registers=81, stack=8))
    with pytest.raises(SystemExit) as ended:
        ptx.main()
    assert ended.value.code == (
        "not as they must be:\n"
        "sm_90 kernel<1>: 81 registers, at most 80 are allowed\n"
        "sm_90 kernel<1>: 8 bytes of stack, at most 0 are allowed"
    )
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("kernel<1>"))
    assert row.split()[1:3] == ["20", "81"]


def test_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(ptx.backends, "triton_kernels", missing)
    monkeypatch.setattr(sys, "argv", ["bench.ptx"])
    with pytest.raises(SystemExit, match=r"Triton cannot be imported \(No module named 'triton'\): pip install triton"):
        ptx.main()
