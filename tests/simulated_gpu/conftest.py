"""Which of the tests here run where: those of the translator and the executor by themselves, without the simulated GPU,
whose functions would take the place of theirs; all others on it.
"""

import os
from pathlib import Path

from tests.simulated_gpu import control

BY_THEMSELVES = {"test_kernels.py", "test_opcodes.py", "test_translator.py"}
ALL = {path.name for path in Path(__file__).parent.glob("test_*.py")}
is_on_it = control.LIBRARY in os.environ or control.WHY_NOT in os.environ
collect_ignore = sorted(BY_THEMSELVES if is_on_it else ALL - BY_THEMSELVES)
