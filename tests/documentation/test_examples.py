"""What the examples say where something that they need is missing: one line with the remedy. Run by pytest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
IN_THEIR_OWN_PROCESSES = ("train_ddp", "train_fsdp2")
NEEDED = {
    "accelerate_digits": ("integrations", "accelerate"),
    "compiled_step": (None, "wd_fused"),
    "lagged_clipping": ("demo", "sklearn"),
    "lightning_digits": ("integrations", "lightning"),
    "step_in_backward": (None, "wd_fused"),
    "timm_digits": ("integrations", "timm"),
    "train_ddp": ("demo", "sklearn"),
    "train_digits": ("demo", "rich"),
    "train_fsdp2": ("demo", "sklearn"),
    "transformers_trainer": ("integrations", "transformers"),
}
WITHOUT_TORCH = [("compiled_step", "torch"), ("train_ddp", "torch"), ("train_fsdp2", "torch")]
WITHOUT = """
import runpy, sys
missing, sys.argv[0] = sys.argv.pop(1), sys.argv.pop(1)
sys.path.insert(0, {folder!r})
sys.modules[missing] = None
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | environment
    return subprocess.run([sys.executable, *arguments], env=own, capture_output=True, text=True, timeout=600)


def test_every_program_among_them_is_here() -> None:
    programs = {path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert programs == set(NEEDED)


@pytest.mark.parametrize(("name", "package"), [*((name, own) for name, (_, own) in NEEDED.items()), *WITHOUT_TORCH])
def test_a_missing_package_is_named_with_the_remedy_in_one_line(name: str, package: str) -> None:
    extra, _ = NEEDED[name]
    path = str(EXAMPLES / f"{name}.py")
    done = run("-c", WITHOUT.format(folder=str(EXAMPLES)), package, path)
    install = "pip install ." if extra is None else f"pip install '.[{extra}]'"
    before = "run `make demo`, or " if name == "train_digits" else ""
    assert done.stderr == f"{name}.py needs {package}: {before}{install} in the repository\n"
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize("name", IN_THEIR_OWN_PROCESSES)
def test_without_torchrun_its_command_is_told_in_one_line(name: str) -> None:
    done = run(str(EXAMPLES / f"{name}.py"), PYTHONPATH=os.pathsep.join(sys.path))
    said = f"{name}.py runs in several processes: torchrun --nproc_per_node=2 examples/{name}.py\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_lagged_clipping_tells_how_far_it_is_from_exact_clipping() -> None:
    pytest.importorskip("sklearn", reason="the example needs the extra 'demo'")
    done = run(
        str(EXAMPLES / "lagged_clipping.py"), "--epochs", "1", "--seeds", "1", PYTHONPATH=os.pathsep.join(sys.path)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("its coefficient to the exact one: the same in ")
