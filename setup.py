"""Builds the package: with wd_fused._C ahead of time where torch can be imported, else without it.

Run by pip. An isolated build (`pip install .`) sees no torch and must not fetch one: it would be a second torch, and
the wrong one to link against. The wheel then carries the sources, and wd_fused/build builds them at first use.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import setuptools
from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import ModuleError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OWN = ["wd_fused", *(f"wd_fused.{name}" for name in ("backends", "build", "options", "step"))]
WHEELS = {"dist_info", "bdist_wheel", "editable_wheel"}  # what pip runs


def module_of_the_package(name: str) -> ModuleType:
    """A module of wd_fused that needs only the standard library, loaded without wd_fused itself, which needs torch."""
    spec = importlib.util.spec_from_file_location(f"_wd_fused_{name}", ROOT / "wd_fused" / "build" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_config = module_of_the_package("config")
toolchain = module_of_the_package("toolchain")


def require_bdist_wheel() -> None:
    """The command is setuptools' own since 70.1, before that the package wheel's; distributions have older ones."""
    try:
        setuptools.Distribution().get_command_class("bdist_wheel")
    except ModuleError:
        raise SystemExit(
            f"wd_fused: setuptools {setuptools.__version__} cannot make a wheel by itself: "
            f"{sys.executable} -m pip install 'setuptools>=70.1,<82' (a range that every torch allows)"
        ) from None


class BuildPackage(build_py):
    """Copies the package; a source file that is gone must not stay in build/ and be compiled by every later install."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib) / "wd_fused" / "csrc", ignore_errors=True)
        super().run()


def ahead_of_time() -> dict[str, Any]:
    """The arguments of setup() that build wd_fused._C; none where torch cannot be imported."""
    # On a machine with a CUDA toolkit and no GPU the import logs a warning, and a toolkit that may not be the one.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        print("wd_fused: torch cannot be imported here, so the C++ extension is left to its first use", file=sys.stderr)
        return {}
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.NOTSET)
    torch_version = str(torch.__version__)
    part = toolchain.cuda_part(CSRC, torch_version, torch.version.cuda, toolchain.gpu_capabilities(torch.cuda))
    targets, without = (None, part) if isinstance(part, str) else (part.targets, None)

    class BuildModule(cpp_extension.BuildExtension):  # type: ignore[misc,name-defined]
        """Says what is missing before the compilers do, and writes beside the module what it was built for."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            try:
                os.environ["PATH"] = toolchain.path_with_ninja()
            except toolchain.MissingTool as missing:
                print(f"wd_fused: {missing}. Without it one file is compiled after another.", file=sys.stderr)
            super().__init__(*arguments, **options)

        def run(self) -> None:
            try:
                toolchain.cxx_compiler()
                toolchain.require_python_headers()
            except toolchain.MissingTool as missing:
                raise SystemExit(
                    f"wd_fused: {missing}. `pip install .` (isolated) installs without a compiler."
                ) from None
            # In place, as an editable install is: a module whose record is older than itself must never be seen.
            (ROOT / "wd_fused" / build_config.RECORD_NAME).unlink(missing_ok=True)
            super().run()
            module = Path(self.get_ext_fullpath("wd_fused._C"))
            build_config.write_record(module, CSRC, torch_version, targets, without)

        def build_extensions(self) -> None:
            nonlocal targets, without
            if targets is not None:
                print(f"wd_fused: CUDA part for {targets} ({part.chosen_by}), by {part.nvcc}", file=sys.stderr)
                try:
                    with toolchain.torch_builds_with(part, cpp_extension):
                        super().build_extensions()
                    return
                except Exception as error:  # whatever it is, the CPU part is worth having alone
                    without = (
                        f"nvcc {part.version} ({part.nvcc}) failed for {targets}: {error}: "
                        "`pip install --verbose --no-build-isolation` shows the whole build"
                    )
                    targets = None
                    (extension,) = self.extensions
                    vars(extension).update(vars(described(cpp_extension, None)))
            print(f"wd_fused: without the CUDA part: {without}", file=sys.stderr)
            super().build_extensions()

    module = described(cpp_extension, None if isinstance(part, str) else part)
    return {"ext_modules": [module], "cmdclass": {"build_py": BuildPackage, "build_ext": BuildModule}}


def described(cpp_extension: ModuleType, part: Any) -> Any:
    """wd_fused._C as setuptools wants it told, with this CUDA part, or without one."""
    targets = None if part is None else part.targets
    sources = build_config.sources(CSRC, part is not None)
    headers = [header for pattern in ("*.h", "*.cuh") for header in CSRC.rglob(pattern)]
    make = cpp_extension.CppExtension if part is None else cpp_extension.CUDAExtension
    with toolchain.torch_builds_with(part, cpp_extension):
        return make(
            "wd_fused._C",
            [str(source.relative_to(ROOT)) for source in sources],
            include_dirs=[str(CSRC)],
            depends=[str(header.relative_to(ROOT)) for header in headers],
            extra_compile_args={
                "cxx": build_config.cxx_flags(targets),
                "nvcc": build_config.nvcc_flags(targets),
            },
        )


def layout() -> dict[str, Any]:
    """The packages, and where they lie.

    csrc and triton_kernels lie beside the package in the repository and inside it once installed. An editable install
    has the package alone, which for setuptools is a path in a .pth file: for folders that lie elsewhere it would be an
    import hook, and those come after the current directory, where a clone named wd_fused looks like a package.
    """
    if "editable_wheel" in sys.argv:
        return {"packages": OWN, "package_dir": {"": "."}}
    return {
        "packages": [*OWN, "wd_fused.csrc", "wd_fused.triton_kernels"],
        "package_dir": {"wd_fused.csrc": "csrc", "wd_fused.triton_kernels": "triton_kernels"},
    }


if WHEELS & set(sys.argv):
    require_bdist_wheel()
setup(
    # Not in pyproject.toml: before setuptools 77 an expression there is an error, and later ones need a new packaging.
    license="Apache-2.0",
    package_data={"wd_fused": ["py.typed"], "wd_fused.csrc": list(build_config.SOURCE_PATTERNS)},
    include_package_data=False,
    **layout(),
    **({"cmdclass": {"build_py": BuildPackage}} | ahead_of_time()),
)
