"""Kernels of the simulated device, as host code registers, loads and launches them: here from PTX of our own.
Run on it, by `make simulated-gpu`.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_uint8, c_uint32, c_uint64, c_void_p
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.simulated_gpu import control
from tests.simulated_gpu.cuda_support import (
    D2H,
    CudaError,
    begin_capture,
    call,
    code_of,
    copy,
    end_capture,
    found,
    library,
    memory,
    ready,
    status,
    stream,
    synchronize,
)

pytestmark = pytest.mark.skipif(control.LIBRARY not in os.environ, reason="runs on the simulated GPU alone")

# Thread i of all writes `value + extra` to word i of `words`, where that is below `count`.
PTX = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry {name}(
	.param .u8 {name}_param_0,
	.param .u64 .ptr .global .align 4 {name}_param_1,
	.param .align 4 .b8 {name}_param_2[12]
)
.maxntid 256, 1, 1
{{
	.reg .pred %p<2>;
	.reg .b16 %rs<2>;
	.reg .b32 %r<10>;
	.reg .b64 %rd<5>;
	.shared .align 4 .b8 {name}_shared[64];
	ld.param.u8 %rs1, [{name}_param_0];
	ld.param.u64 %rd1, [{name}_param_1];
	ld.param.u32 %r1, [{name}_param_2];
	ld.param.u32 %r2, [{name}_param_2+8];
	mov.u32 %r3, %ctaid.x;
	mov.u32 %r4, %ntid.x;
	mov.u32 %r5, %tid.x;
	mad.lo.s32 %r6, %r3, %r4, %r5;
	setp.ge.u32 %p1, %r6, %r1;
	@%p1 bra $L_end;
	cvt.u32.u16 %r7, %rs1;
	add.s32 %r8, %r7, %r2;
	mul.wide.u32 %rd2, %r6, 4;
	add.s64 %rd3, %rd1, %rd2;
	st.global.u32 [%rd3], %r8;
$L_end:
	ret;
}}
"""
_registered: list[Kernel] = []
_names = (f"planted_store_{number}" for number in count())


class Kernel:
    """Registered as nvcc's code registers one, by an address that stands for it."""

    def __init__(self, name: str) -> None:
        self.name = name
        _registered.append(self)  # as code is: for ever
        self._stands = ctypes.create_string_buffer(1)
        self._name = ctypes.create_string_buffer(name.encode())
        self.function = c_void_p(ctypes.addressof(self._stands))
        library().__getattr__("__cudaRegisterFunction")(None, self.function, None, self._name, -1, *[None] * 5)

    def launch(self, *arguments: Any, blocks: int = 1, threads: int = 32, shared: int = 0, on: Any = None) -> None:
        pointers = (c_void_p * len(arguments))(*[ctypes.addressof(argument) for argument in arguments])
        call("cudaLaunchKernel", self.function, Dim3(blocks, 1, 1), Dim3(threads, 1, 1), pointers, c_size_t(shared), on)

    def store(self, words: Any, number: int, value: int, **how: Any) -> None:
        self.launch(c_uint8(value), c_uint64(words.value), (c_uint32 * 3)(number, 0, 1_000), **how)


class Dim3(ctypes.Structure):
    _fields_ = (("x", c_uint), ("y", c_uint), ("z", c_uint))


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    name = next(_names)
    path = tmp_path / "planted.ptx"
    path.write_text(PTX.format(name=name))
    monkeypatch.setenv("SIMULATED_GPU_PTX", f"{os.environ['SIMULATED_GPU_PTX']}:{path}")
    yield Kernel(name)
    control.reset()


def read_words(at: Any, number: int) -> list[int]:
    back = (c_uint32 * number)()
    copy(back, at, 4 * number, D2H)
    return list(back)


def test_a_launch_hands_over_its_parameters_as_they_are_then(kernel):
    words = memory(4 * 100)
    on = stream()
    call("simulated_gpu_hold", on, 0)
    kernel.store(words, 100, 7, blocks=4, on=on)
    kernel.store(words, 10, 8, blocks=4, on=on)
    synchronize(on)
    assert read_words(words, 100) == [1_008] * 10 + [1_007] * 90


def test_a_kernel_that_writes_beyond_an_allocation_is_a_fault_that_names_it(kernel):
    words = memory(4 * 100)
    faults = found(lambda: kernel.store(words, 101, 7, blocks=4))
    assert kernel.name in faults
    call("cudaFree", memory(8))


def test_unordered_kernels_that_write_the_same_bytes_race(kernel):
    words = memory(4 * 100)

    def program() -> None:
        kernel.store(words, 100, 7, blocks=4, on=stream())
        kernel.store(words, 100, 7, blocks=4, on=stream())

    assert found(program).count(f"kernel {kernel.name} on stream") == 2


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"threads": 1_025}, "cudaErrorInvalidConfiguration"),
        ({"threads": 0}, "cudaErrorInvalidConfiguration"),
        ({"blocks": 0}, "cudaErrorInvalidConfiguration"),
        ({"threads": 257}, r"cudaErrorInvalidValue.*at most 256 threads a block, not 257"),
        ({"shared": 49_153}, r"cudaErrorInvalidValue.*49153 bytes of dynamic shared memory, 49152 are allowed"),
    ],
    ids=str,
)
def test_a_launch_of_a_shape_that_the_device_has_not_is_refused(kernel, how, error):
    with pytest.raises(CudaError, match=error):
        kernel.store(memory(400), 100, 7, **how)


def test_dynamic_shared_memory_is_allowed_by_an_attribute(kernel):
    call("cudaFuncSetAttribute", kernel.function, 8, 100_000)
    kernel.store(memory(400), 100, 7, shared=100_000)
    with pytest.raises(CudaError, match="cudaErrorInvalidValue"):
        call("cudaFuncSetAttribute", kernel.function, 8, 232_448 - 63)


def test_a_launch_on_a_stream_of_another_device_is_refused(kernel):
    call("cudaSetDevice", 1)
    other = stream()
    call("cudaSetDevice", 0)
    with pytest.raises(CudaError, match=r"cudaErrorInvalidResourceHandle.*while cuda:0 is current"):
        kernel.store(memory(400), 100, 7, on=other)


def test_a_kernel_without_ptx_is_an_error_that_names_it():
    with pytest.raises(CudaError, match=r"cudaErrorNotSupported.*no PTX for the kernel nobody_wrote_it"):
        Kernel("nobody_wrote_it").launch()


@pytest.mark.parametrize("loaded", [False, True])
def test_a_kernel_in_a_capture_was_loaded_before_it(kernel, loaded):
    words, on = memory(400), stream()
    if loaded:
        attributes = ctypes.create_string_buffer(512)
        call("cudaFuncGetAttributes", attributes, kernel.function)
    begin_capture(on)
    if not loaded:
        with pytest.raises(CudaError, match=r"cudaErrorStreamCaptureUnsupported.*not loaded before"):
            kernel.store(words, 100, 7, blocks=4, on=on)
        assert status(on) == "invalidated"
        return
    kernel.store(words, 100, 7, blocks=4, on=on)
    call("cudaGraphLaunch", ready(end_capture(on)), on)
    synchronize(on)
    assert read_words(words, 100) == [1_007] * 100


def test_loading_a_kernel_breaks_a_capture_under_way(kernel):
    on = stream()
    begin_capture(on)
    with pytest.raises(CudaError, match="cudaErrorStreamCaptureUnsupported"):
        call("cudaFuncGetAttributes", ctypes.create_string_buffer(512), kernel.function)
    assert status(on) == "invalidated"


def cubin(number: int) -> bytes:
    """The head of an ELF file, which points to nothing behind it."""
    return b"\x7fELF" + struct.pack("<12xHHIQQQIHHHHHH", 2, 190, number, 0, 0, 64, 0, 64, 56, 0, 64, 0, 0)


def test_a_module_is_found_by_its_cubin(tmp_path, monkeypatch):
    driver = ctypes.CDLL("libcuda.so.1")
    monkeypatch.setenv("SIMULATED_GPU_TRITON_PTX", str(tmp_path))
    image, name = cubin(1), next(_names)
    (tmp_path / f"{control.digest(image):016x}.ptx").write_text(PTX.format(name=name))
    module, function, words = c_void_p(), c_void_p(), memory(400)
    assert driver.cuModuleLoadData(byref(module), c_char_p(image)) == 0
    assert driver.cuModuleGetFunction(byref(function), module, b"another") != 0
    assert driver.cuModuleGetFunction(byref(function), module, name.encode()) == 0
    threads = c_int()
    assert driver.cuFuncGetAttribute(byref(threads), 0, function) == 0
    assert threads.value == 256
    arguments = (c_uint8(5), c_uint64(words.value), (c_uint32 * 3)(100, 0, 1_000))
    pointers = (c_void_p * 3)(*[ctypes.addressof(argument) for argument in arguments])
    assert driver.cuLaunchKernel(function, 4, 1, 1, 32, 1, 1, 0, None, pointers, None) == 0
    assert read_words(words, 100) == [1_005] * 100

    assert driver.cuModuleLoadData(byref(module), c_char_p(cubin(2))) == 801
    text = c_char_p()
    driver.cuGetErrorString(801, byref(text))
    assert b"no PTX for a cubin" in (text.value or b"")
    assert code_of("cudaPeekAtLastError") == 0, "the driver's errors are not the runtime's"


def test_occupancy_is_bound_by_threads_blocks_and_shared_memory(kernel):
    def blocks(threads: int, shared: int) -> int:
        found = c_int()
        call("cudaOccupancyMaxActiveBlocksPerMultiprocessor", byref(found), kernel.function, threads, c_size_t(shared))
        return found.value

    assert (blocks(256, 0), blocks(32, 0), blocks(256, 100_000), blocks(33, 0)) == (8, 32, 2, 32)
