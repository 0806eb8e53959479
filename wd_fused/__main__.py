"""`python -m wd_fused`: the environment report. Exits with 1 if the self-test finds a differing bit."""

import sys

from wd_fused.report import main

sys.exit(main())
