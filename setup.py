"""Builds the package: with wd_fused._C ahead of time where torch can be imported, else without it.

Run by pip. An isolated build (`pip install .`) sees no torch and must not fetch one: it would be a second torch, and
the wrong one to link against. The wheel then carries the sources, and wd_fused/extension.py builds them at first use.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"


def module_of_the_package(name: str) -> ModuleType:
    """A module of wd_fused that needs only the standard library, loaded without wd_fused itself, which needs torch."""
    spec = importlib.util.spec_from_file_location(f"_wd_fused_{name}", ROOT / "wd_fused" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_config = module_of_the_package("build_config")
toolchain = module_of_the_package("toolchain")


class BuildPackage(build_py):
    """Copies the package; a source file that is gone must not stay in build/ and be compiled by every later install."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib) / "wd_fused" / "csrc", ignore_errors=True)
        super().run()


def ahead_of_time() -> dict[str, Any]:
    """The arguments of setup() that build wd_fused._C; none where torch cannot be imported."""
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("wd_fused: torch cannot be imported here, so the C++ extension is left to its first use", file=sys.stderr)
        return {}

    class BuildModule(BuildExtension):  # type: ignore[misc]
        """Says what is missing before the compiler does, and writes beside the module what it was built for."""

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
            folder = Path(self.get_ext_fullpath("wd_fused._C")).parent
            build_config.write_record(folder / build_config.RECORD_NAME, CSRC, str(torch.__version__))

    extension = CppExtension(
        "wd_fused._C",
        [str(source.relative_to(ROOT)) for source in build_config.sources(CSRC)],
        depends=[str(header.relative_to(ROOT)) for header in CSRC.glob("*.h")],
        extra_compile_args=list(build_config.CXX_FLAGS),
    )
    return {"ext_modules": [extension], "cmdclass": {"build_py": BuildPackage, "build_ext": BuildModule}}


setup(
    packages=["wd_fused", "wd_fused.csrc", "wd_fused.triton_kernels"],
    # csrc and triton_kernels lie beside the package in the repository and inside it once installed.
    package_dir={"wd_fused.csrc": "csrc", "wd_fused.triton_kernels": "triton_kernels"},
    package_data={"wd_fused": ["py.typed"], "wd_fused.csrc": list(build_config.SOURCE_PATTERNS)},
    include_package_data=False,
    **({"cmdclass": {"build_py": BuildPackage}} | ahead_of_time()),
)
