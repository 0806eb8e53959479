# ruff: noqa: E501 (tables of PTX)
"""PTX read and translated: control flow, scopes, names; and what is not known is an error that names it."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulated_gpu import build, kernel_support, translator
from tests.simulated_gpu.translator import compile as compiling
from tests.simulated_gpu.translator.ptx import Address, Instruction, Unsupported, number, parse
from tests.simulated_gpu.translator.writer import Writer

needs_compiler = pytest.mark.skipif(kernel_support.COMPILER is None, reason="no g++ on PATH")
HEADER = ".version 8.8\n.target sm_90\n.address_size 64\n"


def entry(body: str, name: str = "kernel", parameters: str = ".param .u64 out") -> str:
    return f".visible .entry {name}({parameters})\n{{\n.reg .b32 %r<9>; .reg .b64 %q<9>; .reg .pred %p<9>;\n{body}\nret;\n}}\n"


def result_of(folder: Path, body: str, text: str = "") -> int:
    path = folder / "one.ptx"
    path.write_text(text or HEADER + entry(f"ld.param.u64 %q1, [out]; {body} st.global.u32 [%q1], %r1;"))
    out = kernel_support.Memory(bytes(4))
    kernel_support.launch(path, "kernel", struct.pack("<Q", out.address))
    return struct.unpack("<I", out.read())[0]


@needs_compiler
@pytest.mark.parametrize(
    ("body", "right"),
    [
        ("mov.u32 %r2, 2; mov.u32 %r1, 0; bra $end; mov.u32 %r1, 5; $end: add.u32 %r1, %r1, %r2;", 2),
        ("mov.u32 %r2, 1; ts: .branchtargets $a, $b; brx.idx %r2, ts; $a: mov.u32 %r1, 1; bra $c; $b: mov.u32 %r1, 7; $c:", 7),
        ("mov.u32 %r1, 1; { .reg .b32 %r1; mov.u32 %r1, 2; } { .reg .b32 x; mov.u32 x, 4; add.u32 %r1, %r1, x; }", 5),
        ("mov.u32 %r1, 3;\n.loc 1 2 3\nadd.u32 %r1, %r1, 1; // add.u32 %r1, %r1, 1;\n/* add.u32 %r1, %r1, 1; */", 4),
        ("mov.pred %p1, 0; mov.u32 %r1, 1; @%p1 mov.u32 %r1, 2; @!%p1 add.u32 %r1, %r1, 8;", 9),
        ("mov.u32 %r2, 4; setp.lt.u32 %p1|%p2, %r2, 5; selp.u32 %r1, 1, 0, %p1; selp.u32 %r3, 2, 0, %p2; or.b32 %r1, %r1, %r3;", 1),
        ("mov.u32 %r2, 4; mov.pred %p3, 1; setp.gt.and.s32 %p1, %r2, 5, %p3; setp.gt.or.s32 %p2, %r2, 5, !%p1; selp.u32 %r1, 1, 0, %p2;", 1),
        ("mov.u32 %r2, 0x3F804000; mov.u32 %r3, 0x40003F80; setp.gt.bf16x2 %p1|%p2, %r2, %r3; selp.u32 %r1, 1, 0, %p1; @%p2 add.u32 %r1, %r1, 2;", 1),
        ("mov.pred %p3, 0; mov.u32 %r2, 0x3C004000; mov.u32 %r3, 0x40003C00; setp.lt.and.f16x2 %p1|%p2, %r2, %r3, !%p3; selp.u32 %r1, 1, 0, %p1; @%p2 add.u32 %r1, %r1, 2;", 2),
        ("mov.f32 %r1, 0f3F800000; mov.b64 %q2, 0dC000000000000000; cvt.rn.f32.f64 %r2, %q2; add.rn.f32 %r1, %r1, %r2;", 0xBF800000),
        ("mov.u32 %r1, 0x10U; add.s32 %r1, %r1, -020;", 0),
    ],
)  # fmt: skip
def test_control_flow_scopes_and_numbers(tmp_path, body, right):
    assert result_of(tmp_path, body) == right


def test_an_index_outside_of_a_table_is_a_fault(tmp_path):
    with pytest.raises(kernel_support.Fault, match="an index outside of the table"):
        result_of(tmp_path, "mov.u32 %r2, 2; ts: .branchtargets $a, $b; brx.idx %r2, ts; $a: mov.u32 %r1, 1; $b:")


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("setp.lt.f16x2 %p1, %r1, %r2;", "the operands"),
        ("frobnicate.rn.f32 %r1, %r2;", "frobnicate.rn.f32"),
        ("add.rz.f32 %r1, %r2, %r3;", "add.rz.f32"),
        ("ld.global.cleverly.u32 %r1, [%q1];", ".cleverly of ld.global.cleverly.u32"),
        ("ld.global.b128 %r1, [%q1];", "ld.global.b128"),
        ("atom.global.mul.u32 %r1, [%q1], %r2;", ".mul of atom.global.mul.u32"),
        ("atom.cta.global.add.u32 %r1, [%q1], %r2;", ".cta of atom.cta.global.add.u32"),
        ("fence.proxy.async;", "fence.proxy.async"),
        ("bar.cluster.sync 0;", "bar.cluster.sync"),
        ("shfl.up.b32 %r1, %r2, 1, 0;", "shfl.up.b32"),
        ("add.u32 %r1, %r2, %undeclared;", "%undeclared"),
        ("add.u32 %r1, %r2;", "1 operands"),
        ("call.uni vprintf, (%r1);", "call.uni"),
        (".reg .b128 %w; mov.b128 %w, 0;", "mov.b128"),
        ("cvt.rn.satfinite.e4m3x2.f32 %r1, %r2, %r3;", "cvt.rn.satfinite.e4m3x2.f32"),
    ],
)
def test_what_is_not_known_is_an_error_that_names_it(code, named):
    with pytest.raises(Unsupported, match=re.escape(named)) as error:
        Writer(parse(HEADER + entry(code), "kernel")).write()
    assert "kernel, line 7" in str(error.value)


def test_the_command_line_says_what_it_does_not_know(tmp_path):
    ptx = tmp_path / "one.ptx"
    ptx.write_text(HEADER + entry("frobnicate.u32 %r1, %r2;"))

    def said(*arguments: object) -> str:
        command = [sys.executable, "-m", "tests.simulated_gpu.translator", *map(str, arguments)]
        done = subprocess.run(command, cwd=kernel_support.ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        return done.stderr

    assert "frobnicate.u32" in said(ptx, "kernel", tmp_path / "out.so")
    assert "no kernel other; there are kernel" in said(ptx, "other", tmp_path / "out.so")
    assert not list(tmp_path.glob("out*"))


def test_operands_are_read_as_they_stand():
    kernel = parse(HEADER + entry("@!%p1 ld.global.v2.b32 { %r1, _ }, [ %q1 + -8 ];"), "kernel")
    load = next(each for each in kernel.statements if isinstance(each, Instruction))
    assert (load.predicate, load.operands) == ("!%p1", (("%r1", "_"), Address("%q1", -8)))
    assert [number(each) for each in ("-5", "0x1fU", "0f3F800000", "0dBFF0000000000000")] == [
        -5, 0x1F, 0x3F800000, 0xBFF0000000000000
    ]  # fmt: skip


def test_kernels_that_differ_in_their_parameters_size_share_a_library():
    def text(size: int, block: int, code: str = "") -> str:
        name = f"_Z6kernelILi{size}EEv"
        body = f".shared .b32 {name[2:]}_word; bra $L__BB{block}_1; $L__BB{block}_1: ld.param.u32 %r1, [{name}_p+8]; {code}"
        return entry(body, name, f".param .align 8 .b8 {name}_p[{size}]")

    whole = HEADER + text(64, 0) + text(128, 1) + text(256, 2, "mov.u32 %r2, 5;")
    keys = [compiling.body_key(whole, f"_Z6kernelILi{size}EEv") for size in (64, 128, 256)]
    assert keys[0] == keys[1] != keys[2]


@needs_compiler
def test_a_kernel_is_translated_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMULATED_GPU_KERNELS", str(tmp_path / "kernels"))
    assert result_of(tmp_path, "mov.u32 %r1, 4;") == 4
    (library,) = [path for path in (tmp_path / "kernels").glob("*.so") if not path.name.startswith("body")]
    translated = library.stat().st_mtime_ns
    monkeypatch.setenv("SIMULATED_GPU_PYTHON", "/bin/false")  # nothing is left to translate
    for name in ("again", "other"):
        (tmp_path / name).mkdir()
    assert result_of(tmp_path / "again", "mov.u32 %r1, 4;") == 4
    assert library.stat().st_mtime_ns == translated
    with pytest.raises(RuntimeError, match="cannot be translated"):
        result_of(tmp_path / "other", "", HEADER + entry("mov.u32 %r1, 5;"))


@needs_compiler
def test_executed_instructions_are_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMULATED_GPU_COUNT", "1")
    monkeypatch.setenv("SIMULATED_GPU_KERNELS", str(tmp_path / "kernels"))
    result_of(tmp_path, "mov.u32 %r1, 0; $again: add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 5; @%p1 bra $again;")
    assert kernel_support.counts() == {
        "ld.param.u64": 1, "mov.u32": 1, "add.u32": 5, "setp.lt.u32": 5, "bra": 4, "st.global.u32": 1, "ret": 1
    }  # fmt: skip


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_all_kernels_of_csrc_are_known():
    try:
        ptx = Path(os.environ.get("SIMULATED_GPU_PTX") or build.environment()["SIMULATED_GPU_PTX"])
    except build.Unavailable as reason:
        pytest.skip(str(reason))
    text = ptx.read_text()
    names = translator.ptx.kernel_names(text)
    bodies = {compiling.body_key(text, name): name for name in names}
    assert len(bodies) < len(names)  # both sizes of the parameter block have one, as a rule
    for name in bodies.values():
        Writer(parse(text, name)).write()
