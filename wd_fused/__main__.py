"""`python -m wd_fused`: the environment report. Exit status: 0 fused and right, 1 a wrong bit, 2 right, not fused."""

import sys

from wd_fused.report import main

sys.exit(main(*sys.argv[1:]))
