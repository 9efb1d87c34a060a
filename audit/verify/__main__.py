"""`python -m audit.verify`: the same as `affidavit verify`."""

from __future__ import annotations

import sys

from audit.verify.cli import main

sys.exit(main(sys.argv[1:]))
