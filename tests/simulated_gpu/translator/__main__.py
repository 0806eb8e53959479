import sys

from . import translate
from .ptx import Unsupported

if len(sys.argv) != 4:
    sys.exit("python -m tests.simulated_gpu.translator PTX KERNEL OUT.so")
try:
    translate(*sys.argv[1:])
except (Unsupported, RuntimeError) as error:
    sys.exit(f"{sys.argv[1]}: {error}")
