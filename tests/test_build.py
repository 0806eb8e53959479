"""Installing and building wd_fused as a user meets it: both kinds of install, the JIT build, and all that can go wrong.

Every case is a process of its own. Virtual environments are fresh, and see the torch of the environment that runs the
tests through a .pth file instead of installing another. Where the real sources prove nothing more, a stand-in for csrc
that compiles in half a second takes their place.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from wd_fused import build_config, extension, toolchain

ROOT = Path(__file__).resolve().parent.parent

STAND_IN = """
#include <Python.h>
#include <cstdlib>
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, TEXT(TORCH_EXTENSION_NAME), nullptr, -1, nullptr};
extern "C" __attribute__((visibility("default"))) PyObject* JOIN(PyInit_, TORCH_EXTENSION_NAME)() {
    if (ABORT) abort();
    return PyModule_Create(&definition);
}
"""

# What a user's program does, and what it saw.
TRAIN = """
import json, sys, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import wd_fused
    from wd_fused import FusedSGD, extension
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
from wd_fused import extension
module, status = extension.find(csrc=Path(sys.argv[1]))
print(json.dumps(vars(status) | {"loaded": module is not None}))
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
    """The environment of the tests without what steers Python, torch's extensions or wd_fused."""
    steers = ("WD_FUSED_", "PYTHON", "TORCH_EXTENSIONS_DIR", "CXX", "PIP_REQUIRE_VIRTUALENV", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(steers)}
    return kept | {"HOME": str(home), "TORCH_NO_COMPILER_WRAPPER": "1"} | env


def copy_of_the_repository(to: Path) -> Path:
    """What git would give, without anything that was built in place."""
    to.mkdir(parents=True)
    built = shutil.ignore_patterns("__pycache__", "*.so", build_config.RECORD_NAME)
    for folder in ("wd_fused", "csrc", "triton_kernels"):
        shutil.copytree(ROOT / folder, to / folder, ignore=built)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to / name)
    return to


def make_stand_in(folder: Path, abort: bool = False) -> Path:
    folder.mkdir(parents=True)
    (folder / "module.cpp").write_text(STAND_IN.replace("ABORT", str(abort).lower()))
    return folder


def make_virtual_environment(folder: Path) -> str:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    where = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    seen = [path for path in [*site.getsitepackages(), site.getusersitepackages()] if os.path.isdir(path)]
    seen.append(str(Path(torch.__file__).parent.parent))
    # A path in a .pth file comes after the environment's own packages, and .pth files in it (an editable install's) are
    # not read: wd_fused is the one that gets installed here, or none.
    (Path(where.strip()) / "packages_of_the_tests.pth").write_text("\n".join(dict.fromkeys(seen)) + "\n")
    return str(python)


def pip_install(python: str, home: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--force-reinstall", *arguments],
        env=clean_environment(home),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0 and "No matching distribution found for setuptools" in done.stdout + done.stderr:
        pytest.skip("an isolated build fetches setuptools, and pip cannot reach a package index here")
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
    return Programs(python, clean_environment(home, TORCH_EXTENSIONS_DIR=str(base / "isolated_cache")), base)


@pytest.fixture(scope="module")
def first_use(isolated: Programs) -> Run:
    """The first program that uses what `pip install .` installed."""
    return isolated.run(TRAIN)


@pytest.fixture(scope="module")
def beside_torch(base: Path) -> Programs:
    """`pip install --no-build-isolation .` in a fresh virtual environment."""
    home = base / "beside_torch_home"
    home.mkdir()
    python = make_virtual_environment(base / "beside_torch")
    pip_install(python, home, "--no-build-isolation", str(copy_of_the_repository(base / "beside_torch_source")))
    return Programs(python, clean_environment(home, WD_FUSED_JIT="0"), base)


@pytest.fixture(scope="module")
def bare_python(base: Path) -> str:
    """A virtual environment where nothing is installed, so no ninja either."""
    return make_virtual_environment(base / "bare")


@pytest.fixture
def checkout(tmp_path: Path, bare_python: str) -> Programs:
    """A source checkout where nothing was built, with an empty extension cache."""
    tree = copy_of_the_repository(tmp_path / "checkout")
    home = tmp_path / "home"
    home.mkdir()
    env = clean_environment(home, PYTHONPATH=str(tree), TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
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


class TestIsolatedInstall:
    def test_it_is_pure_python_and_carries_the_sources(self, isolated: Programs) -> None:
        packages = Path(isolated.python).parent.parent.glob("lib/python*/site-packages")
        (installed,) = [path for folder in packages for path in folder.glob("wd_fused")]
        (wheel,) = installed.parent.glob("wd_fused-*.dist-info/WHEEL")
        assert "Root-Is-Purelib: true" in wheel.read_text()
        assert "Tag: py3-none-any" in wheel.read_text()
        assert not [path.name for path in installed.rglob("*") if path.suffix == ".so" or path.name == "_C.json"]
        sources = {path.name for pattern in build_config.SOURCE_PATTERNS for path in (ROOT / "csrc").glob(pattern)}
        assert sources and {path.name for path in (installed / "csrc").iterdir() if path.is_file()} == sources
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
        run = beside_torch.run(TRAIN)
        assert run.said["source"] == "ahead-of-time"
        assert run.said["path"].startswith(str(Path(beside_torch.python).parent.parent))
        assert run.said["reason"] is None
        assert run.said["warnings"] == []
        assert run.said["equal"]

    def test_a_module_for_another_torch_is_not_imported(
        self, isolated: Programs, first_use: Run, checkout: Programs, bare_python: str, tmp_path: Path
    ) -> None:
        package = checkout.cwd / "wd_fused"
        module = package / ("_C" + importlib.machinery.EXTENSION_SUFFIXES[0])
        compile_by_hand(make_stand_in(tmp_path / "crashes", abort=True) / "module.cpp", module)
        record = package / build_config.RECORD_NAME
        build_config.write_record(record, checkout.cwd / "csrc", torch.__version__)
        imported = checkout.start(TRAIN)
        imported.communicate(timeout=600)
        assert imported.returncode == -signal.SIGABRT, "the module under test must crash whoever imports it"

        build_config.write_record(record, checkout.cwd / "csrc", "2.0.1+another")
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
import wd_fused.triton_kernels
from wd_fused import extension
module = extension.load()
print(json.dumps(vars(extension.status()) | {"name": module.__name__, "triton": wd_fused.triton_kernels.__file__}))
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

    def test_a_module_without_a_record_is_not_imported(self, checkout: Programs, tmp_path: Path) -> None:
        module = checkout.cwd / "wd_fused" / ("_C" + importlib.machinery.EXTENSION_SUFFIXES[0])
        compile_by_hand(make_stand_in(tmp_path / "crashes", abort=True) / "module.cpp", module)
        assert "has no record of what it was built for" in checkout.run(TRAIN, WD_FUSED_JIT="0").said["reason"]


def compile_by_hand(source: Path, to: Path) -> None:
    include = sysconfig.get_path("include")
    command = [toolchain.cxx_compiler(), "-shared", "-fPIC", f"-I{include}", "-DTORCH_EXTENSION_NAME=_C", source]
    subprocess.run([*command, "-o", to], check=True)


class TestJitBuild:
    def test_the_cache_is_torchs(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from torch.utils import cpp_extension

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "default"))
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        assert str(extension.cache_root() / "name") == cpp_extension._get_build_directory("name", False)
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "chosen"))
        assert str(extension.cache_root() / "name") == cpp_extension._get_build_directory("name", False)

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
        assert in_the_cache(checkout) == sorted(["build.lock", name])
        later = checkout.run(LOAD, stand_in)
        assert later.said["loaded"] and later.said["seconds"] is None

    def test_a_damaged_module_is_built_again(self, checkout: Programs, stand_in: str) -> None:
        path = Path(checkout.run(LOAD, stand_in).said["path"])
        path.write_bytes(b"not a shared library")
        again = checkout.run(LOAD, stand_in)
        assert again.said["loaded"] and again.said["seconds"] > 0

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
