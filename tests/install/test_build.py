"""Installing and building wd_fused as a user meets it: both kinds of install, the JIT build, and all that can go wrong.

Most cases are processes of their own. Virtual environments are fresh, and see the torch of the environment that runs
the tests through a .pth file instead of installing another. Where the real sources prove nothing more, a stand-in for
csrc that compiles in half a second takes their place; with a CUDA part, in two. Nothing here needs a GPU, and what
needs nvcc is skipped without.
"""

from __future__ import annotations

import email.message
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import tarfile
import time
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from wd_fused.build import config as build_config
from wd_fused.build import extension, jit, toolchain

ROOT = Path(__file__).resolve().parents[2]

STAND_IN = """
#include <Python.h>
#include <cstdlib>
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)
#if defined(WD_FUSED_CUDA)
const char* architectures();
#else
static const char* architectures() { return nullptr; }
#endif
static PyObject* cuda_architectures(PyObject*, PyObject*) { return Py_BuildValue("z", architectures()); }
static PyMethodDef methods[] = {{"cuda_architectures", cuda_architectures, METH_NOARGS, nullptr}, {}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, TEXT(TORCH_EXTENSION_NAME), nullptr, -1, methods};
extern "C" __attribute__((visibility("default"))) PyObject* JOIN(PyInit_, TORCH_EXTENSION_NAME)() {
    if (ABORT) abort();
    return PyModule_Create(&definition);
}
"""

STAND_IN_CUDA = """
__global__ void kernel(float* p) { p[threadIdx.x] *= 2; }
const char* architectures() { return WD_FUSED_CUDA_ARCHS; }
"""

# What a user's program does, and what it saw.
TRAIN = """
import json, sys, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import wd_fused
    from wd_fused import FusedSGD
    from wd_fused.build import extension
    def train(make):
        torch.manual_seed(20)
        parameters = [torch.nn.Parameter(torch.randn(size)) for size in (7, 1000)]
        optimizer = make(parameters)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        return torch.cat([parameter.detach() for parameter in parameters])
    options = dict(lr=0.1, momentum=0.9, weight_decay=5e-4)
    ours = train(lambda parameters: FusedSGD(parameters, **options))
    theirs = train(lambda parameters: torch.optim.SGD(parameters, foreach=False, **options))
    status = extension.status()
print(json.dumps(vars(status) | {
    "equal": torch.equal(ours, theirs),
    "file": wd_fused.__file__,
    "warnings": [str(warning.message) for warning in caught if warning.category is RuntimeWarning],
    "warned_in": [warning.filename for warning in caught if warning.category is RuntimeWarning],
}))
"""

# The same for a stand-in for csrc, which only loads.
LOAD = """
import json, sys
from pathlib import Path
from wd_fused.build import extension
module, status = extension.find(csrc=Path(sys.argv[1]))
architectures = None if module is None else module.cuda_architectures()
print(json.dumps(vars(status) | {"loaded": module is not None, "architectures": architectures}))
"""

# What was built ahead of time, of which nothing but that is asked.
STATUS = """
import json
from wd_fused.build import extension
print(json.dumps(vars(extension.status()) | {"architectures": extension.load().cuda_architectures()}))
"""


class Run(NamedTuple):
    said: dict[str, Any]
    stderr: str


class Programs(NamedTuple):
    """A Python, the environment variables it runs with, and where wd_fused is imported from."""

    python: str
    env: dict[str, str]
    cwd: Path

    def run(self, script: str, *arguments: str, **env: str) -> Run:
        return finish(self.start(script, *arguments, **env))

    def start(self, script: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.python, "-c", script, *arguments],
            cwd=self.cwd,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[str]) -> Run:
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, f"exit status {process.returncode}\n{stdout}\n{stderr}"
    return Run(json.loads(stdout.splitlines()[-1]), stderr)


def clean_environment(home: Path, **env: str) -> dict[str, str]:
    """The environment of the tests without what steers Python, torch's extensions or wd_fused; with ninja on PATH."""
    steers = (
        *("WD_FUSED_", "PYTHON", "PIP_REQUIRE_VIRTUALENV", "VIRTUAL_ENV"),
        *("TORCH_EXTENSIONS_DIR", "TORCH_CUDA_ARCH_LIST", "CXX", "NVCC_"),
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(steers)}
    ours = {"HOME": str(home), "TORCH_NO_COMPILER_WRAPPER": "1", "PATH": toolchain.path_with_ninja()}
    return kept | ours | env


def copy_of_the_repository(to: Path) -> Path:
    """What git would give, without anything that was built in place."""
    to.mkdir(parents=True)
    built = shutil.ignore_patterns("__pycache__", "*.so", build_config.RECORD_NAME)
    for folder in ("wd_fused", "csrc", "triton_kernels"):
        shutil.copytree(ROOT / folder, to / folder, ignore=built)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to / name)
    return to


def make_stand_in(folder: Path, abort: bool = False, cuda: bool = False) -> Path:
    folder.mkdir(parents=True)
    (folder / "module.cpp").write_text(STAND_IN.replace("ABORT", str(abort).lower()))
    if cuda:
        (folder / "kernel.cu").write_text(STAND_IN_CUDA)
    return folder


def make_virtual_environment(folder: Path, ninja: bool = True) -> str:
    """One that sees the packages of the tests, and has ninja, as pip would put it there with wd_fused."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    where = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    seen = [path for path in [*site.getsitepackages(), site.getusersitepackages()] if os.path.isdir(path)]
    seen.append(str(Path(torch.__file__).parent.parent))
    # A path in a .pth file comes after the environment's own packages, and .pth files in it (an editable install's) are
    # not read: wd_fused is the one that gets installed here, or none.
    (Path(where.strip()) / "packages_of_the_tests.pth").write_text("\n".join(dict.fromkeys(seen)) + "\n")
    if ninja:
        (folder / "bin" / "ninja").symlink_to(toolchain.ninja())
    return str(python)


def pip_install(python: str, home: Path, *arguments: str, **env: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--force-reinstall", *arguments],
        env=clean_environment(home, **env),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0 and "No matching distribution found for" in done.stdout + done.stderr:
        pytest.skip("this fetches setuptools, and pip cannot reach a package index here")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("build")


@pytest.fixture(scope="module")
def isolated(base: Path) -> Programs:
    """`pip install .` in a fresh virtual environment, from a tree with a build for another Python lying in it."""
    tree = copy_of_the_repository(base / "isolated_source")
    (tree / "wd_fused" / "_C.cpython-39-x86_64-linux-gnu.so").write_bytes(b"left behind")
    (tree / "wd_fused" / build_config.RECORD_NAME).write_text("{}")
    home = base / "isolated_home"
    home.mkdir()
    python = make_virtual_environment(base / "isolated")
    pip_install(python, home, str(tree))
    env = clean_environment(home, TORCH_EXTENSIONS_DIR=str(base / "isolated_cache"), WD_FUSED_CUDA="0")
    return Programs(python, env, base)


@pytest.fixture(scope="module")
def first_use(isolated: Programs, base: Path) -> Run:
    """The first program that uses what `pip install .` installed.

    Its compiler takes an -O0 behind the -O3 that it is given, so that it takes less time; the bits are the same. That
    the sources compile at -O3 is shown by the module that all other tests run on.
    """
    quick = base / "quick_compiler"
    quick.write_text(f'#!/bin/sh\nexec {toolchain.cxx_compiler()} "$@" -O0\n')
    quick.chmod(0o755)
    return isolated.run(TRAIN, CXX=str(quick))


@pytest.fixture(scope="module")
def beside_torch(base: Path) -> Programs:
    """`pip install --no-build-isolation .` in a fresh virtual environment, with the CUDA part where it can be built.

    Of a stand-in: that the real sources are built ahead of time is shown by the module that all other tests run on.
    """
    home = base / "beside_torch_home"
    home.mkdir()
    python = make_virtual_environment(base / "beside_torch")
    tree = copy_of_the_repository(base / "beside_torch_source")
    shutil.rmtree(tree / "csrc")
    make_stand_in(tree / "csrc", cuda=True)
    not_activated = path_without(base / "not_activated", "ninja")
    pip_install(python, home, "--no-build-isolation", str(tree), TORCH_CUDA_ARCH_LIST="9.0", PATH=not_activated)
    return Programs(python, clean_environment(home, WD_FUSED_JIT="0"), base)


@pytest.fixture(scope="module")
def bare_python(base: Path) -> str:
    """A virtual environment where nothing is installed, so no ninja either."""
    return make_virtual_environment(base / "bare", ninja=False)


@pytest.fixture
def checkout(tmp_path: Path, bare_python: str) -> Programs:
    """A source checkout where nothing was built, with an empty extension cache."""
    tree = copy_of_the_repository(tmp_path / "wd_fused")  # as a clone is called
    home = tmp_path / "home"
    home.mkdir()
    env = clean_environment(home, PYTHONPATH=str(tree), TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"), WD_FUSED_CUDA="0")
    return Programs(bare_python, env, tree)


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    return str(make_stand_in(tmp_path / "stand_in"))


def make_path(folder: Path, *programs: str) -> str:
    """A PATH that holds these programs only."""
    folder.mkdir()
    for program in programs:
        path = toolchain.cxx_compiler() if program == "c++" else shutil.which(program) or toolchain.ninja()
        (folder / program).symlink_to(path)
    return str(folder)


def path_without(folder: Path, *programs: str) -> str:
    """PATH but for these programs: of a folder that has one of them, all else is linked from another one."""
    folders = []
    for number, name in enumerate(os.environ["PATH"].split(os.pathsep)):
        if any((Path(name) / program).exists() for program in programs):
            links = folder / str(number)
            links.mkdir(parents=True)
            for path in Path(name).iterdir():
                if path.name not in programs:
                    (links / path.name).symlink_to(path)
            name = str(links)
        folders.append(name)
    return os.pathsep.join(folders)


def make_compiler(path: Path, before_compiling: str) -> str:
    """The C++ compiler, with something happening before it compiles a file."""
    real = toolchain.cxx_compiler()
    path.write_text(f'#!/bin/sh\ncase " $* " in *" -c "*) {before_compiling} ;; esac\nexec {real} "$@"\n')
    path.chmod(0o755)
    return str(path)


def in_the_cache(programs: Programs) -> list[str]:
    return sorted(path.name for path in Path(programs.env["TORCH_EXTENSIONS_DIR"]).glob("wd_fused_*/*"))


def wait_for(condition: Any, what: str) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError(f"waited a minute for {what}")


class TestTheSetUpOfTheseTests:
    def test_it_needs_no_more_of_the_machine_than_the_README_names(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stand_in: str
    ) -> None:
        """Everything else comes from the environment that the tests run in."""
        monkeypatch.setenv("PATH", path_without(tmp_path / "bin", "ninja", "nvcc", "git", "python3", "cuobjdump"))
        assert shutil.which("ninja") is None
        env = clean_environment(tmp_path, PYTHONPATH=str(ROOT), TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
        python = make_virtual_environment(tmp_path / "bare", ninja=False)
        assert Programs(python, env, tmp_path).run(LOAD, stand_in).said["loaded"]
        python = make_virtual_environment(tmp_path / "with_ninja")
        here = str(tmp_path / "another_cache")
        not_activated = Programs(python, env | {"PATH": os.environ["PATH"], "TORCH_EXTENSIONS_DIR": here}, tmp_path)
        assert not_activated.run(LOAD, stand_in).said["loaded"]


def script_of_make(name: str) -> Any:
    """A script that the Makefile runs, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """make, in the repository, but never with a package index: no test is to fetch gigabytes."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")} | env
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env | {"PIP_NO_INDEX": "1"}, capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
class TestMake:
    def test_what_a_machine_lacks_is_named_before_anything_is_fetched_or_made(self, tmp_path: Path) -> None:
        venv = tmp_path / "venv"
        done = make("install", f"VENV={venv}", f"PYTHON={sys.executable}", CXX="no-such-compiler")
        assert done.returncode != 0
        assert "nothing was fetched yet" in done.stderr and "CXX is 'no-such-compiler'" in done.stderr
        assert not venv.exists()

    def test_an_environment_that_could_not_be_made_is_not_left_half_made(self, tmp_path: Path) -> None:
        broken = tmp_path / "python"
        broken.write_text('#!/bin/sh\n[ "$1" = -m ] || exit 0\nmkdir -p "$3/bin"; exit 1\n')
        broken.chmod(0o755)
        assert make("install", f"VENV={tmp_path / 'new'}", f"PYTHON={broken}").returncode != 0
        assert not (tmp_path / "new").exists()
        (tmp_path / "mine").mkdir()
        assert make("install", f"VENV={tmp_path / 'mine'}", f"PYTHON={broken}").returncode != 0
        assert (tmp_path / "mine").exists(), "what was there before stays"

    def test_all_that_is_missing_is_told_at_once_with_a_line_to_copy(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        prerequisites = script_of_make("prerequisites")
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        assert prerequisites.main(str(tmp_path / "venv")) == 0
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else find_spec(name))
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=3e9))
        assert prerequisites.main(str(tmp_path / "venv")) == 1
        said = capsys.readouterr().err
        for what in ("no virtual environments", "no C++ compiler", "no Python headers", "no 6 GB of disk"):
            assert what in said
        assert said.splitlines()[-1] == f"Debian, Ubuntu: apt-get install {python}-venv g++ {python}-dev"
        (tmp_path / "venv").mkdir()
        prerequisites.main(str(tmp_path / "venv"))
        assert "of disk" not in capsys.readouterr().err, "an environment that is there already may hold all of it"

    def test_an_old_python_is_told(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        prerequisites = script_of_make("prerequisites")
        monkeypatch.setattr(sys, "version_info", (3, 9, 2))
        assert prerequisites.main(".venv") == 1
        assert "Python 3.10 or later" in capsys.readouterr().err

    def test_gpu_check_takes_the_first_python_that_has_torch(self, tmp_path: Path) -> None:
        with_torch, without = tmp_path / "venv" / "bin" / "python", tmp_path / "without"
        with_torch.parent.mkdir(parents=True)
        for path, status in ((with_torch, 0), (without, 1)):
            path.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit {status}\necho ran "$0" "$@"\n')
            path.chmod(0o755)
        venv = f"VENV={tmp_path / 'venv'}"
        assert f"ran {with_torch} -m bench.gpu.check" in make("gpu-check", venv, f"PYTHON={without}").stdout
        with_torch.rename(tmp_path / "with")
        named = f"PYTHON={tmp_path / 'with'}"
        assert f"ran {tmp_path / 'with'} -m bench.gpu.check" in make("gpu-check", venv, named).stdout
        neither = make("gpu-check", venv, f"PYTHON={without}")
        assert neither.returncode == 2 and "has torch: PYTHON=... names one" in neither.stderr

    @pytest.mark.parametrize(
        "target", ["demo", "test", "integrations", "bench", "bench-full", "bench-smoke", "gpu-check", "sass", "ptx"]
    )
    def test_a_long_target_says_first_what_it_does(self, target: str, tmp_path: Path) -> None:
        stamps = [f"--assume-old={tmp_path}/{name}.stamp" for name in ("torch", "package", "bench", "integrations")]
        for stamp in stamps:
            Path(stamp.partition("=")[2]).touch()
        planned = make("--dry-run", *stamps, f"VENV={tmp_path}", target).stdout
        assert re.match(r"printf '==> %s\\n' \".+: .*(minutes?|hour)", planned), planned


class TestConstraints:
    def test_all_that_the_Makefile_installs_is_pinned(self) -> None:
        constraints = script_of_make("constraints")
        pinned = {re.split("[=;]", line)[0] for line in constraints.FILE.read_text().splitlines() if line[0] != "#"}
        installs = re.findall(r"^\t\$\(PIP\) (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        named = {word.strip("'") for line in installs for word in line.split() if not word.startswith("--")}
        assert {re.sub(r"\[.*", "", name) for name in named} <= pinned | {".", "wd_fused"}

    def test_what_is_not_pinned_as_it_is_installed_is_named(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        constraints = script_of_make("constraints")
        monkeypatch.setattr(constraints, "FILE", tmp_path / "constraints.txt")
        found = {
            "wd_fused": distribution("wd_fused", requires=["torch>=2.11", "pytest; extra == 'test'"], extras=["test"]),
            "torch": distribution("torch", "2.14.1", requires=["NumPy", "colorama; sys_platform == 'win32'"]),
            "pytest": distribution("pytest", "9.2.0", requires=["wd_fused"]),
            "numpy": distribution("NumPy", "2.4.6", python=">=3.11,!=3.14.1"),
            "setuptools": distribution("setuptools", "84.2.1", python=">=3.9"),
            "colorama": distribution("colorama"),
            "unrelated": distribution("unrelated"),
        }
        monkeypatch.setattr(constraints, "distribution", lambda name: found[name.lower()])
        monkeypatch.setattr(constraints, "PackageNotFoundError", KeyError)
        assert constraints.main() == 0
        numpy = 'numpy==2.4.6; python_full_version != "3.14.1" and python_full_version >= "3.11"'
        written = constraints.FILE.read_text().splitlines()
        assert [line for line in written if line[0] != "#"] == [
            numpy,
            "pytest==9.2.0",
            "setuptools==84.2.1",
            "torch==2.14.1",
        ]
        assert constraints.main("--check") == 0
        del found["pytest"]  # its extra is not installed
        assert constraints.main("--check") == 0
        found["torch"] = distribution("torch", "2.15.0", requires=["NumPy"])
        assert constraints.main("--check") == 1
        assert "torch==2.15.0" in capsys.readouterr().out
        monkeypatch.setattr(constraints, "HEADER", "# for another Python")
        assert constraints.main("--check") == 0
        assert "not checked" in capsys.readouterr().out


def distribution(
    name: str,
    version: str = "1.0",
    requires: list[str] | None = None,
    python: str = "",
    extras: list[str] | None = None,
) -> Any:
    """What importlib.metadata tells of a package."""
    metadata = email.message.Message()
    metadata["Requires-Python"] = python
    for extra in extras or []:
        metadata["Provides-Extra"] = extra
    return types.SimpleNamespace(name=name, version=version, requires=requires, metadata=metadata)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zeros_at_the_end(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, size // 2)
    os.truncate(path, size)


DAMAGES = {
    "cut short": cut_short,
    "zeros at the end": zeros_at_the_end,
    "nothing but zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


class TestIsolatedInstall:
    def test_it_is_pure_python_and_carries_the_sources(self, isolated: Programs) -> None:
        packages = Path(isolated.python).parent.parent.glob("lib/python*/site-packages")
        (installed,) = [path for folder in packages for path in folder.glob("wd_fused")]
        (wheel,) = installed.parent.glob("wd_fused-*.dist-info/WHEEL")
        assert "Root-Is-Purelib: true" in wheel.read_text()
        assert "Tag: py3-none-any" in wheel.read_text()
        assert not [path.name for path in installed.rglob("*") if path.suffix == ".so" or path.name == "_C.json"]
        sources = {path.name for pattern in build_config.SOURCE_PATTERNS for path in (ROOT / "csrc").glob(pattern)}
        assert sources and {path.name for path in (installed / "csrc").rglob("*") if path.is_file()} == sources
        assert (installed / "py.typed").is_file()
        assert (installed / "triton_kernels" / "__init__.py").is_file()

    def test_the_first_use_builds_and_says_so(self, isolated: Programs, first_use: Run) -> None:
        assert first_use.said["file"].startswith(str(Path(isolated.python).parent.parent))
        assert first_use.said["source"] == "jit"
        assert first_use.said["seconds"] > 0
        assert first_use.said["equal"]
        assert first_use.said["warnings"] == []
        building, built = first_use.stderr.splitlines()
        assert (
            building.startswith("wd_fused: building its C++ extension with ") and "not built ahead of time" in building
        )
        assert built.startswith("wd_fused: built in ")

    def test_later_processes_need_neither_compiler_nor_ninja(
        self, isolated: Programs, first_use: Run, tmp_path: Path
    ) -> None:
        again = isolated.run(TRAIN, PATH=make_path(tmp_path / "bin"))
        assert again.stderr == ""
        assert again.said["source"] == "jit"
        assert again.said["path"] == first_use.said["path"]
        assert again.said["seconds"] is None
        assert again.said["equal"]


class TestAheadOfTime:
    def test_an_install_beside_torch_is_built_ahead_of_time(self, beside_torch: Programs) -> None:
        run = beside_torch.run(STATUS)
        assert run.said["source"] == "ahead-of-time"
        assert run.said["path"].startswith(str(Path(beside_torch.python).parent.parent))
        assert run.said["reason"] is None
        assert run.stderr == ""

    def test_ninja_compiles_it_where_the_environment_is_not_activated(self, beside_torch: Programs, base: Path) -> None:
        assert list((base / "beside_torch_source" / "build").glob("temp*/build.ninja"))

    def test_it_has_its_CUDA_part_where_there_is_nvcc(self, beside_torch: Programs) -> None:
        run = beside_torch.run(STATUS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
            part = toolchain.cuda_part(ROOT / "csrc", str(torch.__version__), torch.version.cuda, [])
        if isinstance(part, str):
            assert part in run.said["cuda"] and run.said["architectures"] is None
        else:
            assert run.said["cuda"] is None and run.said["architectures"] == "9.0"
            assert code_in(run.said["path"]) and set(code_in(run.said["path"])) == {"sm_90"}

    def test_a_module_for_another_torch_is_not_imported(
        self, isolated: Programs, first_use: Run, checkout: Programs, bare_python: str, tmp_path: Path
    ) -> None:
        package = checkout.cwd / "wd_fused"
        module = package / ("_C" + importlib.machinery.EXTENSION_SUFFIXES[0])
        compile_by_hand(make_stand_in(tmp_path / "crashes", abort=True) / "module.cpp", module)
        build_config.write_record(module, checkout.cwd / "csrc", torch.__version__)
        imported = checkout.start(TRAIN)
        imported.communicate(timeout=600)
        assert imported.returncode == -signal.SIGABRT, "the module under test must crash whoever imports it"

        build_config.write_record(module, checkout.cwd / "csrc", "2.0.1+another")
        forbidden = checkout.run(TRAIN, WD_FUSED_JIT="0")
        assert forbidden.said["source"] == "none"
        assert forbidden.said["equal"]
        reason = f"the module built ahead of time is for torch 2.0.1+another, this is {torch.__version__}"
        assert reason in forbidden.said["reason"]
        # The sources are those that the isolated install built, so its cache has what is needed instead.
        instead = checkout.run(TRAIN, TORCH_EXTENSIONS_DIR=isolated.env["TORCH_EXTENSIONS_DIR"])
        assert instead.said["source"] == "jit"
        assert instead.said["reason"] == reason
        assert instead.said["path"] == first_use.said["path"]
        assert instead.said["equal"]

    def test_an_editable_install_is_built_in_place_and_again_when_csrc_changes(
        self, checkout: Programs, tmp_path: Path
    ) -> None:
        shutil.rmtree(checkout.cwd / "csrc")
        make_stand_in(checkout.cwd / "csrc")
        python = make_virtual_environment(tmp_path / "editable")
        pip_install(python, tmp_path / "home", "--no-build-isolation", "--editable", str(checkout.cwd))
        env = {name: value for name, value in checkout.env.items() if name != "PYTHONPATH"}
        editable = Programs(python, env, tmp_path)
        script = """
import json
from wd_fused.backends import triton_kernels
from wd_fused.build import extension
module = extension.load()
print(json.dumps(vars(extension.status()) | {"name": module.__name__, "triton": triton_kernels().__file__}))
"""
        built = editable.run(script)
        assert built.said["source"] == "ahead-of-time"
        assert built.said["name"] == "wd_fused._C"
        assert Path(built.said["path"]).parent == checkout.cwd / "wd_fused"
        assert Path(built.said["triton"]).parent == checkout.cwd / "triton_kernels"

        (checkout.cwd / "csrc" / "more.h").write_text("// not there when the module was built\n")
        changed = editable.run(script)
        assert changed.said["source"] == "jit"
        assert changed.said["reason"] == "csrc has changed since the module was built ahead of time"
        assert changed.said["seconds"] > 0

    @pytest.mark.parametrize(
        "older",
        [("setuptools==66.1.1", "wheel==0.45.1"), ("setuptools==78.1.1", "packaging==23.2")],
        ids=lambda x: x[0],
    )
    def test_older_setuptools_read_the_metadata(self, older: tuple[str, str], tmp_path: Path) -> None:
        done = metadata_with(older, tmp_path)
        assert "Would install wd" in done.stdout, done.stdout + done.stderr

    def test_setuptools_that_cannot_make_a_wheel_are_named_with_the_remedy(self, tmp_path: Path) -> None:
        done = metadata_with(("setuptools==66.1.1",), tmp_path)
        assert "wd_fused: setuptools 66.1.1 cannot make a wheel by itself" in done.stdout + done.stderr
        assert "pip install 'setuptools>=70.1,<82'" in done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr

    def test_a_module_without_a_record_is_not_imported(self, checkout: Programs, tmp_path: Path) -> None:
        module = checkout.cwd / "wd_fused" / ("_C" + importlib.machinery.EXTENSION_SUFFIXES[0])
        compile_by_hand(make_stand_in(tmp_path / "crashes", abort=True) / "module.cpp", module)
        assert "has no record of what it was built for" in checkout.run(TRAIN, WD_FUSED_JIT="0").said["reason"]

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_damaged_module_is_not_imported(
        self, damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stand_in: str
    ) -> None:
        module = tmp_path / ("_C" + importlib.machinery.EXTENSION_SUFFIXES[0])
        module.write_bytes(b"\x7fELF as it was built" * 1000)
        build_config.write_record(module, Path(stand_in), str(torch.__version__))
        monkeypatch.setattr(extension, "_PACKAGE", tmp_path)
        monkeypatch.setitem(sys.modules, "wd_fused._C", imported := types.ModuleType("wd_fused._C"))
        assert extension._ahead_of_time(Path(stand_in)) is imported
        DAMAGES[damage](module)
        reason = str(extension._ahead_of_time(Path(stand_in)))
        assert reason.startswith(f"the module built ahead of time is damaged: {module} ")
        assert reason.endswith("; install wd_fused again")

    @pytest.mark.parametrize("content", [b"", b"{", bytes(9), b"\xff", b"[]", b'{"torch": "2.14"}'])
    def test_a_damaged_record_is_none(
        self, content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stand_in: str
    ) -> None:
        module = tmp_path / ("_C" + importlib.machinery.EXTENSION_SUFFIXES[0])
        module.write_bytes(b"\x7fELF")
        (tmp_path / build_config.RECORD_NAME).write_bytes(content)
        monkeypatch.setattr(extension, "_PACKAGE", tmp_path)
        assert "has no record of what it was built for" in str(extension._ahead_of_time(Path(stand_in)))


def metadata_with(packages: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    """What pip says of the checkout in an environment with these packages alone, where it builds nothing."""
    tree = copy_of_the_repository(folder / "wd_fused")
    python = folder / "environment" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "environment"], check=True)
    pip_install(str(python), folder, *packages)
    command = ("install", "--no-deps", "--no-build-isolation", "--dry-run", tree)
    return subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, *command],
        env=clean_environment(folder),
        capture_output=True,
        text=True,
    )


class TestSourceDistribution:
    def test_it_holds_what_builds_the_package_and_no_tests(self, tmp_path: Path) -> None:
        tree = copy_of_the_repository(tmp_path / "wd_fused")
        expected = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
        shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        script = "import setuptools.build_meta as backend; backend.build_sdist('dist')"
        subprocess.run([sys.executable, "-c", script], cwd=tree, env=clean_environment(tmp_path), check=True)
        (archive,) = (tree / "dist").iterdir()
        with tarfile.open(archive) as opened:
            files = {member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()}
        made = {name for name in files if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
        assert files - made == expected


def compile_by_hand(source: Path, to: Path) -> None:
    include = sysconfig.get_path("include")
    command = [toolchain.cxx_compiler(), "-shared", "-fPIC", f"-I{include}", "-DTORCH_EXTENSION_NAME=_C", source]
    subprocess.run([*command, "-o", to], check=True)


class TestJitBuild:
    def test_the_cache_is_torchs(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from torch.utils import cpp_extension

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "default"))
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        assert str(jit.cache_root() / "name") == cpp_extension._get_build_directory("name", False)
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "chosen"))
        assert str(jit.cache_root() / "name") == cpp_extension._get_build_directory("name", False)

    def test_a_change_of_sources_or_compiler_is_another_build(
        self, checkout: Programs, stand_in: str, tmp_path: Path
    ) -> None:
        first = checkout.run(LOAD, stand_in)
        renamed = tmp_path / "renamed"
        renamed.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo another\nexec {toolchain.cxx_compiler()} "$@"\n')
        renamed.chmod(0o755)
        second = checkout.run(LOAD, stand_in, CXX=str(renamed))
        (Path(stand_in) / "more.h").write_text("// more\n")
        third = checkout.run(LOAD, stand_in)
        assert len({run.said["path"] for run in (first, second, third)}) == 3
        assert all(run.said["seconds"] > 0 for run in (first, second, third))
        assert str(renamed) in second.stderr

    def test_two_processes_that_start_together_build_once(
        self, checkout: Programs, stand_in: str, tmp_path: Path
    ) -> None:
        log = tmp_path / "compiled"
        slow = make_compiler(tmp_path / "slow", f"echo once >> {log}; sleep 4")
        both = [checkout.start(LOAD, stand_in, CXX=slow) for _ in range(2)]
        runs = [finish(process) for process in both]
        assert log.read_text().split() == ["once"]
        assert [run.said["loaded"] for run in runs] == [True, True]
        builder, waiter = sorted(runs, key=lambda run: run.said["seconds"] is None)
        assert "building" in builder.stderr and builder.said["seconds"] > 4
        assert "waiting for another process" in waiter.stderr and waiter.said["seconds"] is None

    def test_a_failure_is_not_repeated_by_those_who_waited_for_it(
        self, checkout: Programs, stand_in: str, tmp_path: Path
    ) -> None:
        log = tmp_path / "compiled"
        slow = make_compiler(tmp_path / "slow", f"echo once >> {log}; sleep 4; echo 'error: no such luck' >&2; exit 1")
        both = [checkout.start(LOAD, stand_in, CXX=slow) for _ in range(2)]
        runs = [finish(process) for process in both]
        assert log.read_text().split() == ["once"]
        assert all("no such luck" in run.said["reason"] for run in runs)

    def test_a_build_killed_half_way_leaves_the_next_one_clean(
        self, checkout: Programs, stand_in: str, tmp_path: Path
    ) -> None:
        log = tmp_path / "compiling"
        slow = make_compiler(tmp_path / "slow", f"echo once >> {log}; sleep 8")
        killed = checkout.start(LOAD, stand_in, CXX=slow)
        wait_for(log.exists, "the compiler to start")
        killed.kill()
        killed.communicate()
        # The compiler of the killed build is still at work while the next process builds, and ends after it.
        after = checkout.run(LOAD, stand_in)
        assert after.said["loaded"] and after.said["seconds"] < 8
        wait_for(lambda: not group_exists(killed.pid), "the compiler of the killed build to end")
        name = Path(after.said["path"]).name
        assert in_the_cache(checkout) == sorted(["build.lock", build_config.RECORD_NAME, name])
        later = checkout.run(LOAD, stand_in)
        assert later.said["loaded"] and later.said["seconds"] is None

    def test_a_damaged_module_is_built_again(self, checkout: Programs, stand_in: str) -> None:
        """Loaded, each ends the process by a signal."""
        path = Path(checkout.run(LOAD, stand_in).said["path"])
        for damage in ("cut short", "zeros at the end"):
            DAMAGES[damage](path)
            again = checkout.run(LOAD, stand_in)
            assert again.said["loaded"] and again.said["seconds"] > 0

    def test_a_module_is_on_the_disk_before_it_has_its_name(
        self, machine: Machine, stand_in: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done: list[tuple[str, str]] = []
        fsync, replace = os.fsync, os.replace
        monkeypatch.setattr(
            os, "fsync", lambda fd: (done.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))
        )
        monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("replace", str(a))), replace(a, b)))
        (Path(stand_in) / "test.h").write_text(f"// {stand_in}\n")  # torch's helper builds one name once a process
        path = Path(str(machine.load(Path(stand_in))[0].path))
        assert [what for what, _ in done] == ["fsync", "replace"] * 2
        assert [Path(name).name for _, name in done] == [build_config.RECORD_NAME] * 2 + [path.name] * 2

    def test_verbose_shows_the_build(self, checkout: Programs, stand_in: str) -> None:
        process = checkout.start(LOAD, stand_in, WD_FUSED_VERBOSE="1")
        stdout, _ = process.communicate(timeout=600)
        assert "-ffp-contract=off" in stdout and "module.cpp" in stdout


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


ARCHITECTURES = {"12.4": (50, 60, 70, 75, 80, 86, 87, 89, 90), "13.0": (75, 80, 86, 87, 89, 90, 100, 103, 120, 121)}


TOOLKIT, _ = toolchain.cuda_home()


class Machine:
    """This process on a machine with an empty extension cache, other GPUs, and without nvcc unless it is on PATH."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], cache: Path) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd
        for name in ("WD_FUSED_CUDA", "WD_FUSED_JIT", "WD_FUSED_VERBOSE", "TORCH_CUDA_ARCH_LIST", "CXX"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(cache))
        monkeypatch.setattr(toolchain, "USUAL_CUDA_HOME", "/nowhere")

    def load(self, csrc: Path, *gpus: tuple[int, int], **env: str) -> tuple[extension.Status, str | None, str]:
        """What is found for these sources, the targets that the module tells, and what was printed."""
        self.capfd.readouterr()
        with self.monkeypatch.context() as patch:
            patch.setattr(toolchain, "gpu_capabilities", lambda torch_cuda: list(gpus))
            for name, value in env.items():
                patch.setenv(name, value)
            module, status = extension.find(csrc=csrc)
        assert module is not None, status.reason
        return status, module.cuda_architectures(), self.capfd.readouterr().err


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Machine:
    return Machine(monkeypatch, capfd, tmp_path / "cache_of_this_process")


def make_toolkit(folder: Path, release: str, otherwise: str = "exit 1") -> Path:
    """A folder that looks like a CUDA toolkit, with an nvcc that tells its version and does nothing ``otherwise``."""
    (folder / "include").mkdir(parents=True, exist_ok=True)
    (folder / "include" / "cuda_runtime.h").touch()
    architectures = ARCHITECTURES["13.0" if release.startswith("13.") else "12.4"]
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "nvcc").write_text(
        f"""#!/bin/sh
case "$*" in
    --version) echo "Cuda compilation tools, release {release}, V{release}.99" ;;
    --list-gpu-arch) printf 'compute_%s\\n' {" ".join(map(str, architectures))} ;;
    --dryrun*) echo '#$ TOP={folder}/bin/..' >&2 ;;
    *) {otherwise} ;;
esac
"""
    )
    (folder / "bin" / "nvcc").chmod(0o755)
    return folder


class TestWhetherThereIsACudaPart:
    """One function decides it for both kinds of build; each refusal says what to do."""

    @pytest.fixture(autouse=True)
    def _a_machine_of_its_own(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "WD_FUSED_CUDA", "NVCC_CCBIN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        monkeypatch.setattr(toolchain, "USUAL_CUDA_HOME", str(tmp_path / "nowhere"))

    @pytest.fixture
    def csrc(self, tmp_path: Path) -> Path:
        return make_stand_in(tmp_path / "csrc", cuda=True)

    @pytest.fixture
    def toolkit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
        return make_toolkit(tmp_path / "toolkit", "13.0")

    def part(self, csrc: Path, *gpus: tuple[int, int], torch_cuda: str | None = "13.0") -> toolchain.CudaPart:
        part = toolchain.cuda_part(csrc, "2.99", torch_cuda, gpus)
        assert isinstance(part, toolchain.CudaPart), part
        return part

    def refusal(self, csrc: Path, *gpus: tuple[int, int], torch_cuda: str | None = "13.0") -> str:
        refusal = toolchain.cuda_part(csrc, "2.99", torch_cuda, gpus)
        assert isinstance(refusal, str), refusal
        return refusal

    def test_it_is_built_without_a_GPU_by_the_toolkit_that_was_found(self, csrc: Path, toolkit: Path) -> None:
        part = self.part(csrc)
        assert part == (
            str(toolkit),
            str(toolkit / "bin" / "nvcc"),
            "13.0",
            "7.5;8.0;9.0;10.0;12.0+PTX",
            "the default targets",
        )

    def test_nvcc_on_PATH_may_be_a_script_that_calls_the_real_one(
        self, csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = make_toolkit(tmp_path / "real", "13.0")
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "nvcc").write_text(f'#!/bin/sh\nexec {real}/bin/nvcc "$@"\n')
        (tmp_path / "bin" / "nvcc").chmod(0o755)
        part = self.part(csrc)
        assert (part.home, part.nvcc) == (str(real), str(real / "bin" / "nvcc"))

    def test_sources_without_one(self, toolkit: Path, tmp_path: Path) -> None:
        assert "no CUDA part" in self.refusal(make_stand_in(tmp_path / "plain"))

    def test_WD_FUSED_CUDA(self, csrc: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WD_FUSED_CUDA", "0")
        assert "WD_FUSED_CUDA=0 leaves it out" in self.refusal(csrc)

    def test_a_torch_without_CUDA(self, csrc: Path, toolkit: Path) -> None:
        assert "this torch, 2.99, is built without CUDA" in self.refusal(csrc, torch_cuda=None)

    def test_no_nvcc(self, csrc: Path) -> None:
        refusal = self.refusal(csrc)
        assert "no nvcc on PATH nor in CUDA_HOME: install CUDA toolkit 13" in refusal

    def test_a_toolkit_without_nvcc(self, csrc: Path, toolkit: Path) -> None:
        (toolkit / "bin" / "nvcc").unlink()
        assert f"no nvcc in the CUDA toolkit {toolkit} (found by CUDA_HOME): install CUDA toolkit 13" in self.refusal(
            csrc
        )

    def test_nvcc_of_another_major_version(self, csrc: Path, toolkit: Path) -> None:
        make_toolkit(toolkit, "12.4")
        refusal = self.refusal(csrc)
        assert "nvcc is 12.4" in refusal and "torch 2.99 is built for CUDA 13.0: install CUDA toolkit 13" in refusal
        assert "CUDA_HOME" in refusal

    def test_nvcc_of_another_minor_version_will_do(self, csrc: Path, toolkit: Path) -> None:
        assert self.part(csrc, torch_cuda="13.2").version == "13.0"

    def test_nvcc_that_does_not_run(self, csrc: Path, toolkit: Path) -> None:
        (toolkit / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
        assert f"{toolkit}/bin/nvcc does not answer as nvcc does: install CUDA toolkit 13" in self.refusal(csrc)

    def test_the_default_targets_are_those_that_nvcc_knows(self, csrc: Path, toolkit: Path) -> None:
        make_toolkit(toolkit, "12.4")
        assert self.part(csrc, torch_cuda="12.6").targets == "7.5;8.0;9.0+PTX"

    @pytest.mark.parametrize(
        ("gpus", "targets"),
        [
            ([(9, 0)], "9.0"),
            ([(8, 6), (9, 0), (8, 6)], "8.6;9.0"),
            ([(12, 1)], "12.1"),
            # Newer than nvcc, or than what torch's build helpers take: PTX, which the driver compiles.
            ([(13, 0)], "12.1+PTX"),
            ([(12, 1), (13, 0)], "12.1+PTX"),
            ([(8, 8)], "8.7+PTX"),
            # Too old for nvcc: left out.
            ([(5, 2), (9, 0)], "9.0"),
        ],
    )
    def test_GPUs_that_are_present_are_the_targets(
        self, csrc: Path, toolkit: Path, gpus: list[tuple[int, int]], targets: str
    ) -> None:
        part = self.part(csrc, *gpus)
        assert (part.targets, part.chosen_by) == (targets, "the GPUs present")
        assert all(toolchain.covers(targets, gpu) == (gpu > (7, 0)) for gpu in gpus)

    def test_GPUs_that_nvcc_no_longer_compiles_for(self, csrc: Path, toolkit: Path) -> None:
        assert "nvcc 13.0 compiles for none of the GPUs present (compute capability 5.2)" in self.refusal(csrc, (5, 2))

    @pytest.mark.parametrize(
        ("named", "targets"), [("8.6", "8.6"), ("8.0 9.0a+PTX", "8.0;9.0a+PTX"), ("Hopper;", "Hopper"), ("0.1", "0.1")]
    )
    def test_TORCH_CUDA_ARCH_LIST_is_obeyed_whatever_is_present(
        self, csrc: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch, named: str, targets: str
    ) -> None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
        part = self.part(csrc, (9, 0))
        assert (part.targets, part.chosen_by) == (targets, "TORCH_CUDA_ARCH_LIST")

    @pytest.mark.parametrize("named", ["", " ", "native"])
    def test_a_TORCH_CUDA_ARCH_LIST_that_names_nothing(
        self, csrc: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch, named: str
    ) -> None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
        assert self.part(csrc, (9, 0)).targets == "9.0"

    @pytest.mark.parametrize(
        ("targets", "gpu", "covered"),
        [
            ("8.0;9.0", (9, 0), True),
            ("8.0", (8, 6), True),
            ("8.6", (8, 0), False),
            ("8.0", (9, 0), False),
            ("8.0+PTX", (9, 0), True),
            ("9.0+PTX", (8, 0), False),
            ("9.0a+PTX", (10, 0), False),
            ("9.0a", (9, 0), True),
            ("10.0", (10, 3), True),
            ("Hopper", (9, 0), False),
        ],
    )
    def test_which_GPUs_targets_cover(self, targets: str, gpu: tuple[int, int], covered: bool) -> None:
        assert toolchain.covers(targets, gpu) == covered

    def test_no_GPU_is_looked_for_where_torch_sees_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(toolchain, "_capabilities_by_nvml", lambda: [(9, 0)])
        assert toolchain.gpu_capabilities(TorchCuda()) == []
        assert toolchain.gpu_capabilities(TorchCuda((8, 0))) == [(9, 0)]

    def test_torch_is_asked_where_the_driver_does_not_tell(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(toolchain, "_capabilities_by_nvml", list)
        assert toolchain.gpu_capabilities(TorchCuda((8, 0), (9, 0))) == [(8, 0), (9, 0)]
        assert toolchain.gpu_capabilities(TorchCuda(None)) == []

    def test_torch_is_given_toolkit_and_targets_for_as_long_as_it_builds(
        self, csrc: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        names = ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "NVCC_CCBIN")
        monkeypatch.setenv("CXX", sys.executable)
        part = self.part(csrc)
        monkeypatch.setenv("CUDA_HOME", "as it was")
        helpers = types.SimpleNamespace(CUDA_HOME="torch's guess")
        before = dict(os.environ)
        with pytest.raises(ZeroDivisionError), toolchain.torch_builds_with(part, helpers):
            assert [os.environ[name] for name in names] == [str(toolkit), part.targets, sys.executable]
            assert vars(helpers) == {"CUDA_HOME": str(toolkit)}
            raise ZeroDivisionError
        assert dict(os.environ) == before and helpers.CUDA_HOME == "torch's guess"
        with toolchain.torch_builds_with(None, helpers):
            assert dict(os.environ) == before and helpers.CUDA_HOME == "torch's guess"

    def test_no_two_sources_compile_to_an_object_of_one_name(self) -> None:
        stems = [path.stem for path in build_config.sources(ROOT / "csrc", cuda=True)]
        assert len(set(stems)) == len(stems), "setuptools names objects after their sources' stems"


class TorchCuda:
    """torch.cuda on a machine with these GPUs; None is one that CUDA cannot be initialised for."""

    def __init__(self, *gpus: tuple[int, int] | None) -> None:
        self.gpus = gpus

    def device_count(self) -> int:
        return len(self.gpus)

    def get_device_capability(self, index: int) -> tuple[int, int]:
        gpu = self.gpus[index]
        if gpu is None:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
        return gpu


@pytest.fixture
def nvcc(tmp_path: Path) -> None:
    """Skips the test where nvcc, or a torch that is built with CUDA, is missing."""
    part = toolchain.cuda_part(
        make_stand_in(tmp_path / "for_nvcc", cuda=True), str(torch.__version__), torch.version.cuda, []
    )
    if isinstance(part, str):
        pytest.skip(part)


@pytest.fixture
def cuda_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if TOOLKIT is not None and shutil.which("nvcc") is None:  # at the usual place, where Machine does not look
        monkeypatch.setenv("PATH", os.pathsep.join([os.environ["PATH"], os.path.join(TOOLKIT, "bin")]))
    csrc = make_stand_in(tmp_path / "cuda_stand_in", cuda=True)
    # torch's helper builds a module of one name once a process: each test's sources are its own.
    (csrc / "test.h").write_text(f"// {tmp_path}\n")
    return csrc


@pytest.fixture
def cuda_checkout(checkout: Programs) -> Programs:
    """The same checkout, where nothing forbids the CUDA part."""
    return checkout._replace(env={name: value for name, value in checkout.env.items() if name != "WD_FUSED_CUDA"})


@pytest.mark.usefixtures("nvcc")
class TestJitBuildWithCuda:
    def test_TORCH_CUDA_ARCH_LIST_decides_what_is_in_the_module(self, machine: Machine, cuda_stand_in: Path) -> None:
        status, architectures, printed = machine.load(cuda_stand_in, TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX")
        assert architectures == "8.0;9.0+PTX"
        assert status.source == "jit" and status.cuda is None and status.path is not None
        building, _ = printed.splitlines()
        assert "its CUDA part with nvcc " in building and " for 8.0;9.0+PTX (TORCH_CUDA_ARCH_LIST)" in building
        record = json.loads((Path(status.path).parent / build_config.RECORD_NAME).read_text())
        assert record["cuda"] == "8.0;9.0+PTX"
        assert code_in(status.path) == ["sm_80", "sm_90", "sm_90 ptx"]
        another, architectures, _ = machine.load(cuda_stand_in, TORCH_CUDA_ARCH_LIST="8.0")
        assert another.path != status.path and architectures == "8.0"

    def test_what_one_machine_built_serves_others_that_lack_its_tools(
        self, machine: Machine, cuda_stand_in: Path, tmp_path: Path
    ) -> None:
        built, architectures, _ = machine.load(cuda_stand_in, (8, 0))
        assert architectures == "8.0", "a machine with a GPU builds for that GPU only"
        no_nvcc = make_path(tmp_path / "no_nvcc", "c++", "ninja", "as", "ld", "sh")
        no_compiler = make_path(tmp_path / "no_compiler")
        elsewhere = {"CUDA_HOME": "", "CUDA_PATH": ""}
        for gpus, path in (([], no_nvcc), ([(8, 6)], no_nvcc), ([(8, 6)], no_compiler)):
            other, _, printed = machine.load(cuda_stand_in, *gpus, PATH=path, **elsewhere)
            assert other.path == built.path and other.cuda is None
            assert printed == ""

        alone, architectures, _ = machine.load(cuda_stand_in, (9, 0), PATH=no_nvcc, **elsewhere)
        assert architectures is None, "8.0 does not run on 9.0"
        assert alone.cuda is not None and "no nvcc on PATH nor in CUDA_HOME" in alone.cuda
        left_out, _, _ = machine.load(cuda_stand_in, (8, 0), PATH=no_compiler, WD_FUSED_CUDA="0", **elsewhere)
        assert left_out.path == alone.path
        assert left_out.cuda is not None and "WD_FUSED_CUDA=0" in left_out.cuda

    def test_a_build_for_many_targets_serves_a_machine_with_one_of_them(
        self, machine: Machine, cuda_stand_in: Path
    ) -> None:
        many, _, _ = machine.load(cuda_stand_in, (8, 0), (9, 0))
        one, architectures, printed = machine.load(cuda_stand_in, (9, 0))
        assert one.path == many.path and architectures == "8.0;9.0" and printed == ""
        _, architectures, _ = machine.load(cuda_stand_in, (9, 0), TORCH_CUDA_ARCH_LIST="9.0")
        assert architectures == "9.0", "a list that the user named is obeyed"

    def test_the_programs_environment_is_as_before(self, machine: Machine, cuda_stand_in: Path) -> None:
        from torch.utils import cpp_extension

        before = dict(os.environ), cpp_extension.CUDA_HOME
        machine.load(cuda_stand_in, (9, 0))
        assert before == (dict(os.environ), cpp_extension.CUDA_HOME)


def code_in(module: str) -> list[str]:
    """The GPU code in a module, as the cuobjdump that comes with Triton, or with the toolkit, lists it."""
    beside_triton = sorted(Path(torch.__file__).parent.parent.glob("triton/backends/nvidia/bin/cuobjdump"))
    program = str(beside_triton[0]) if beside_triton else shutil.which("cuobjdump")
    if program is None:
        pytest.skip("no cuobjdump, neither Triton's nor a CUDA toolkit's")
    found = []
    for option, kind in (("--list-elf", ""), ("--list-ptx", " ptx")):
        listed = subprocess.run([program, option, module], capture_output=True, text=True, check=True).stdout
        found += [architecture + kind for architecture in re.findall(r"\.(sm_\d+a?)\.", listed)]
    return sorted(found)


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
class TestNvccThatFails:
    """nvcc that answers and compiles nothing: the CPU part is built alone, and the reason is kept."""

    @pytest.fixture
    def log(self, tmp_path: Path) -> Path:
        return tmp_path / "nvcc.log"

    @pytest.fixture
    def broken(self, cuda_checkout: Programs, log: Path, tmp_path: Path) -> Programs:
        strike = f"echo once >> {log}; echo 'error: nvcc is on strike' >&2; exit 1"
        home = make_toolkit(tmp_path / "broken", str(torch.version.cuda), strike)
        return cuda_checkout._replace(env=cuda_checkout.env | {"CUDA_HOME": str(home)})

    def test_the_reason_is_told_and_the_build_not_repeated(
        self, machine: Machine, broken: Programs, cuda_stand_in: Path, log: Path, tmp_path: Path
    ) -> None:
        home = broken.env["CUDA_HOME"]
        first, architectures, printed = machine.load(cuda_stand_in, CUDA_HOME=home)
        assert architectures is None and first.cuda is not None
        assert first.cuda.startswith("the CUDA part could not be built: nvcc ")
        assert "nvcc is on strike" in first.cuda and "WD_FUSED_VERBOSE=1 tries again" in first.cuda
        tried, alone, _ = printed.splitlines()
        assert "its CUDA part with nvcc" in tried and "without its CUDA part, which could not be built" in alone

        second, _, printed = machine.load(cuda_stand_in, CUDA_HOME=home)
        assert second.path == first.path and second.cuda == first.cuda
        assert printed == ""
        assert log.read_text().split() == ["once"]

        machine.load(cuda_stand_in, CUDA_HOME=home, WD_FUSED_VERBOSE="1")
        assert log.read_text().split() == ["once"] * 2, "WD_FUSED_VERBOSE=1 tries again"
        (cuda_stand_in / "more.h").write_text("// more\n")
        machine.load(cuda_stand_in, CUDA_HOME=home)
        assert log.read_text().split() == ["once"] * 3, "other sources may compile"
        make_toolkit(tmp_path / "broken", str(torch.version.cuda), f"echo mended >> {log}; exit 1")
        machine.load(cuda_stand_in, CUDA_HOME=home)
        assert log.read_text().split() == ["once"] * 3 + ["mended"], "another nvcc may compile"

    def test_a_failure_is_forgotten_after_a_day(
        self, machine: Machine, broken: Programs, cuda_stand_in: Path, log: Path, tmp_path: Path
    ) -> None:
        machine.load(cuda_stand_in, CUDA_HOME=broken.env["CUDA_HOME"])
        (failure,) = (tmp_path / "cache_of_this_process").glob("*/failure_*.txt")
        os.utime(failure, (0, time.time() - 25 * 60 * 60))
        machine.load(cuda_stand_in, CUDA_HOME=broken.env["CUDA_HOME"])
        assert log.read_text().split() == ["once"] * 2

    @pytest.mark.parametrize("content", [bytes(100), b"\xff"], ids=["zeros", "no text"])
    def test_a_failure_of_which_a_crash_left_nothing_is_forgotten(
        self, content: bytes, machine: Machine, broken: Programs, cuda_stand_in: Path, log: Path, tmp_path: Path
    ) -> None:
        machine.load(cuda_stand_in, CUDA_HOME=broken.env["CUDA_HOME"])
        (failure,) = (tmp_path / "cache_of_this_process").glob("*/failure_*.txt")
        failure.write_bytes(content)
        found, _, _ = machine.load(cuda_stand_in, CUDA_HOME=broken.env["CUDA_HOME"])
        assert log.read_text().split() == ["once"] * 2
        assert "nvcc is on strike" in str(found.cuda)

    def test_it_is_warned_of_once_and_only_where_there_is_a_GPU(self, broken: Programs) -> None:
        shutil.rmtree(broken.cwd / "csrc")
        make_stand_in(broken.cwd / "csrc", cuda=True)
        script = """
import json, sys, warnings
import torch
from wd_fused.build import extension
torch.cuda.is_available = lambda: len(sys.argv) > 1
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    extension.load()
    extension.load()
print(json.dumps({"warnings": [str(warning.message) for warning in caught]}))
"""
        assert broken.run(script).said["warnings"] == []
        (warning,) = broken.run(script, "GPU").said["warnings"]
        assert "wd_fused runs without its CUDA part" in warning and "nvcc is on strike" in warning

    def test_an_install_has_the_CPU_part_and_records_the_reason(self, broken: Programs, tmp_path: Path) -> None:
        shutil.rmtree(broken.cwd / "csrc")
        make_stand_in(broken.cwd / "csrc", cuda=True)
        python = make_virtual_environment(tmp_path / "editable")
        cuda_home = broken.env["CUDA_HOME"]
        pip_install(
            python, tmp_path / "home", "--no-build-isolation", "--editable", str(broken.cwd), CUDA_HOME=cuda_home
        )
        record = json.loads((broken.cwd / "wd_fused" / build_config.RECORD_NAME).read_text())
        assert record["cuda"] is None
        assert f"({cuda_home}/bin/nvcc) failed for " in record["without_cuda"]
        script = "import json\nfrom wd_fused.build import extension\nprint(json.dumps(vars(extension.status())))"
        env = {name: value for name, value in broken.env.items() if name != "PYTHONPATH"}
        said = Programs(python, env, tmp_path).run(script).said
        assert said["source"] == "ahead-of-time"
        assert record["without_cuda"] in said["cuda"] and "install wd_fused again" in said["cuda"]


class TestFailures:
    """Each ends in one warning that says what is missing and what to do, and in a step that torch's code did."""

    def failure(self, run: Run, *said: str) -> None:
        assert run.said["source"] == "none" and run.said["path"] is None
        assert run.said["equal"]
        (warning,) = run.said["warnings"]
        assert run.said["warned_in"] == ["<string>"], "the warning points at the user's line"
        assert "runs without its compiled part" in warning
        for text in said:
            assert text in warning
            assert text in run.said["reason"]

    def test_no_compiler(self, checkout: Programs, tmp_path: Path) -> None:
        run = checkout.run(TRAIN, PATH=make_path(tmp_path / "bin", "ninja"))
        self.failure(run, "no C++ compiler", "apt-get install g++", "CXX")
        assert run.stderr == ""

    def test_CXX_that_names_no_program(self, checkout: Programs) -> None:
        self.failure(checkout.run(TRAIN, CXX="ccache g++"), "no C++ compiler", "CXX is 'ccache g++'", "unset it")

    def test_a_compiler_that_fails_is_quoted_and_tried_again_by_the_next_process(
        self, checkout: Programs, stand_in: str, tmp_path: Path
    ) -> None:
        broken = make_compiler(tmp_path / "broken", "echo 'error: the assembler is on strike' >&2; exit 1")
        run = checkout.run(TRAIN, CXX=broken)
        self.failure(run, f"{broken} could not build", "error: the assembler is on strike", "WD_FUSED_VERBOSE=1")
        assert "module.o" not in run.said["reason"], "the command lines drown the error"
        assert checkout.run(LOAD, stand_in, CXX=broken).said["source"] == "none"
        mended = checkout.run(LOAD, stand_in)
        assert mended.said["loaded"] and mended.said["seconds"] > 0
        assert not [name for name in in_the_cache(checkout) if name.startswith("build-")]

    def test_a_compiler_that_is_no_program_at_all(self, checkout: Programs, tmp_path: Path) -> None:
        nonsense = tmp_path / "nonsense"
        nonsense.write_bytes(b"\x7fELF nonsense")
        nonsense.chmod(0o755)
        self.failure(checkout.run(TRAIN, CXX=str(nonsense)), f"{nonsense} could not build")

    def test_no_ninja(self, checkout: Programs, tmp_path: Path) -> None:
        run = checkout.run(TRAIN, PATH=make_path(tmp_path / "bin", "c++"))
        self.failure(run, "no ninja", f"{checkout.python} -m pip install ninja")

    def test_a_cache_that_cannot_be_written(self, checkout: Programs, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.touch()
        run = checkout.run(TRAIN, TORCH_EXTENSIONS_DIR=str(file / "below"))
        self.failure(run, "cannot use the extension cache", str(file / "below"), "TORCH_EXTENSIONS_DIR")

    def test_a_forbidden_JIT_build(self, checkout: Programs) -> None:
        self.failure(checkout.run(TRAIN, WD_FUSED_JIT="0"), "WD_FUSED_JIT=0", "pip install --no-build-isolation")

    def test_no_python_headers(self, checkout: Programs, stand_in: str, tmp_path: Path) -> None:
        without = f"import sysconfig; sysconfig.get_path = lambda *_: {str(tmp_path)!r}\n" + LOAD
        run = checkout.run(without, stand_in)
        assert "no Python headers" in run.said["reason"] and "python3-dev" in run.said["reason"]

    def test_a_module_that_does_not_load(self, checkout: Programs, stand_in: str) -> None:
        source = Path(stand_in) / "module.cpp"
        source.write_text("extern int nowhere; int used = nowhere;\n" + source.read_text())
        run = checkout.run(LOAD, stand_in)
        assert "was built but does not load" in run.said["reason"] and "nowhere" in run.said["reason"]
        assert in_the_cache(checkout) == ["build.lock", "failure.txt"]
