"""Builds the simulated GPU: its libraries, torch's operators, and the PTX of csrc. Each once for each state of what it
is made of, into build/simulated_gpu; a lock keeps parallel processes apart.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from . import operators, translator

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNTIME = HERE / "runtime"
CACHE = ROOT / "build" / "simulated_gpu"
CUDA_MAJOR = 13  # of the interface that runtime/ implements, and of the libraries' names
PTX_TARGET = "compute_90"
RUNTIME_FLAGS = ("-std=c++17", "-O2", "-g1", "-fPIC", "-ffp-contract=off", "-Wall")
# Versions of symbols as torch's libraries ask for them, and what kernels, operators and ctypes use beside.
VERSIONS = """libcudart.so.%d { global: cuda*; __cuda*; local: *; };
SIMULATED_GPU { global: simulated_gpu_*; _ZN13simulated_gpu*; _ZNK13simulated_gpu*; _ZT?N13simulated_gpu*; };
"""


class Unavailable(Exception):
    """Why the simulated GPU cannot be built here."""


def environment() -> dict[str, str]:
    """What to add to the environment of a process that is to run on it. Builds what is stale."""
    tools = _Tools()
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runtime = _runtime(tools)
        torch_operators = _operators(tools)
        ptx = _ptx(tools)
    library = str(runtime / f"libcudart.so.{CUDA_MAJOR}")
    return {
        "LD_PRELOAD": _in_front(library, "LD_PRELOAD"),
        "LD_LIBRARY_PATH": _in_front(str(runtime), "LD_LIBRARY_PATH"),
        "TRITON_LIBCUDA_PATH": str(runtime),
        "SIMULATED_GPU_LIBRARY": library,
        "SIMULATED_GPU_OPERATORS": str(torch_operators),
        "SIMULATED_GPU_PTX": str(ptx),
        "SIMULATED_GPU_TRITON_PTX": str(CACHE / "triton"),
        "SIMULATED_GPU_PYTHON": sys.executable,
        "SIMULATED_GPU_KERNELS": str(CACHE / f"kernels-{translator.fingerprint()}"),
        "SIMULATED_GPU_ROOT": str(ROOT),
    }


def _in_front(path: str, variable: str) -> str:
    others = [other for other in os.environ.get(variable, "").split(":") if other and other != path]
    return ":".join([path, *others])


def _module_at(path: Path) -> ModuleType:
    """Without what it is a part of: neither torch nor wd_fused is imported to find out that nothing is stale."""
    spec = importlib.util.spec_from_file_location(f"_simulated_gpu_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


class _Tools:
    """The compilers and torch, or the reason why there are none."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            raise Unavailable("torch is not installed")
        torch_folder = Path(spec.origin).parent
        version = _module_at(torch_folder / "version.py")
        self.torch_version, cuda = str(version.__version__), version.cuda
        self.csrc = ROOT / "csrc"
        part = _module_at(ROOT / "wd_fused" / "build" / "toolchain.py").cuda_part(
            self.csrc, self.torch_version, cuda, []
        )
        if isinstance(part, str):
            raise Unavailable(part)
        if cuda.split(".")[0] != str(CUDA_MAJOR):
            raise Unavailable(
                f"torch is built for CUDA {cuda}, the simulated GPU has the interface of CUDA {CUDA_MAJOR}"
            )
        self.cuda_home, self.nvcc, self.nvcc_version = part.home, part.nvcc, part.version
        named = os.environ.get("CXX", "g++")
        compiler = shutil.which(named)
        if compiler is None:
            raise Unavailable(f"no C++ compiler: {named} is not on PATH")
        self.compiler = compiler
        candidates = [*(Path(self.cuda_home, folder) for folder in ("lib64", "lib")), *_nvidia_folders(torch_folder)]
        real = [path for folder in candidates if (path := folder / f"libcudart.so.{CUDA_MAJOR}").is_file()]
        if not real:
            raise Unavailable(f"no libcudart.so.{CUDA_MAJOR} to read the names of its functions from")
        self.real_cudart = real[0]


def _nvidia_folders(torch_folder: Path) -> Iterable[Path]:
    return (torch_folder.parent / "nvidia").glob("*/lib")


def _digest(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else repr(part).encode()
        digest.update(f"{len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=_without_simulator())
    except FileNotFoundError:
        raise Unavailable(f"{command[0]} is not on PATH") from None
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def _without_simulator() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def _made(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, filled by ``make`` unless it is there; never half filled."""
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make(unfinished)
        unfinished.rename(folder)
    return folder


def _objects(sources: Iterable[Path], headers: Iterable[Path], command: list[str]) -> list[Path]:
    """Compiled one by one, so that only what has changed is compiled again. The largest first."""
    of_all = _digest(command, *sorted(headers))
    folder = CACHE / "objects"
    folder.mkdir(exist_ok=True)

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}-{_digest(of_all, source)}.o"
        if not target.is_file():
            unfinished = target.with_suffix(".unfinished")
            _run([*command, "-c", str(source), "-o", str(unfinished)])
            unfinished.rename(target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, sorted(sources, key=lambda source: -source.stat().st_size)))


def _runtime(tools: _Tools) -> Path:
    """The folder of libcudart and libcuda."""
    sources, headers = sorted(RUNTIME.glob("*.cpp")), sorted(RUNTIME.glob("*.h"))
    command = [tools.compiler, *RUNTIME_FLAGS, f"-I{tools.cuda_home}/include"]
    state = _digest(Path(__file__), command, tools.nvcc_version, *sources, *headers)

    def make(folder: Path) -> None:
        driver = RUNTIME / "driver.cpp"
        others = [source for source in sources if source != driver]
        objects = _objects(others, headers, [*command, f"-I{_error_names(tools)}"])
        (driver_object,) = _objects([driver], headers, command)
        versions = folder / "versions"
        versions.write_text(VERSIONS % CUDA_MAJOR)
        cudart = folder / f"libcudart.so.{CUDA_MAJOR}"
        wanted = _defined(tools.real_cudart, dynamic=True)
        stubs = _stubs(folder / "cudart_stubs.cpp", wanted - _defined(*objects), "not_simulated", command)
        link = [tools.compiler, "-shared", "-pthread", "-Wl,-z,lazy"]
        _run([*link, "-o", str(cudart), *map(str, objects), str(stubs), f"-Wl,-soname,{cudart.name}",
              f"-Wl,--version-script={versions}", "-ldl"])  # fmt: skip
        wanted = _names_of_driver(Path(tools.cuda_home) / "include" / "cuda.h")
        stubs = _stubs(folder / "driver_stubs.cpp", wanted - _defined(driver_object), "driver_not_simulated", command)
        _run([*link, "-o", str(folder / "libcuda.so.1"), str(driver_object), str(stubs), str(cudart),
              "-Wl,-soname,libcuda.so.1", "-Wl,-rpath,$ORIGIN"])  # fmt: skip

    return _made(CACHE / f"runtime-{state}", make)


def _error_names(tools: _Tools) -> Path:
    """A folder with the cases of cudaGetErrorName(), named by their content."""
    header = (Path(tools.cuda_home) / "include" / "driver_types.h").read_text(errors="replace")
    names = dict.fromkeys(re.findall(r"^\s+(cudaSuccess|cudaError\w+)\s+=\s*\d+", header, re.MULTILINE))
    cases = "".join(f'case {name}: return "{name}";\n' for name in names)
    return _made(CACHE / f"errors-{_digest(cases)}", lambda folder: _write(folder / "error_names.inc", cases))


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _defined(*paths: Path, dynamic: bool = False) -> set[str]:
    listed = _run(["nm", "--defined-only", "-g", *(["-D"] if dynamic else []), *map(str, paths)])
    return {name.split("@")[0] for name in re.findall(r"^[0-9a-f]+ [TW] (\S+)$", listed, re.MULTILINE)}


def _names_of_driver(header: Path) -> set[str]:
    text = header.read_text(errors="replace")
    declared = re.findall(r"CUDAAPI\s+(cu[A-Z]\w+)\s*\(", text)
    versions = re.findall(r"#define\s+cu[A-Z]\w+\s+(cu[A-Z]\w+_v\d+)\b", text)
    return {*declared, *versions}


def _stubs(path: Path, names: Iterable[str], says: str, command: list[str]) -> Path:
    """Functions that do nothing but say that they are not simulated."""
    functions = "".join(f'int {name}() {{ return simulated_gpu::{says}("{name}"); }}\n' for name in sorted(names))
    path.write_text(f'namespace simulated_gpu {{ int {says}(const char*); }}\nextern "C" {{\n{functions}}}\n')
    compiled = path.with_suffix(".o")
    _run([*command, "-O0", "-c", str(path), "-o", str(compiled)])
    return compiled


def _operators(tools: _Tools) -> Path:
    """The library of torch's operators."""
    headers = [*(HERE / "operators").glob("*.h"), RUNTIME / "control.h"]
    state = _digest(Path(__file__), HERE / "operators" / "__init__.py", tools.compiler, tools.torch_version,
                    sys.version, *operators.SOURCES, *sorted(headers))  # fmt: skip

    def make(folder: Path) -> None:
        compile_, link = operators.flags(tools.cuda_home)
        objects = _objects(operators.SOURCES, headers, [tools.compiler, *compile_])
        _run([tools.compiler, "-shared", "-o", str(folder / "operators.so"), *map(str, objects), *link])

    return _made(CACHE / f"operators-{state}", make) / "operators.so"


def _ptx(tools: _Tools) -> Path:
    """What nvcc makes of csrc's kernels, with the flags of the compiled module."""
    config = _module_at(ROOT / "wd_fused" / "build" / "config.py")
    flags = [flag for flag in config.nvcc_flags("9.0") if not flag.startswith("--threads")]
    command = [tools.nvcc, *flags, f"-arch={PTX_TARGET}", "-std=c++17", f"-I{tools.csrc}", "-ptx"]
    sources = sorted(path for pattern in ("*.h", "*.cuh", "*.cu") for path in tools.csrc.rglob(pattern))
    state = _digest(command, tools.nvcc_version, *sources)

    def make(folder: Path) -> None:
        for source in tools.csrc.rglob("*.cu"):
            _run([*command, str(source), "-o", str(folder / f"{source.stem}.ptx")])

    return next(_made(CACHE / f"ptx-{state}", make).glob("*.ptx"))


if __name__ == "__main__":
    for name, value in environment().items():
        print(f"export {name}={value}")
