"""A systemd unit that keeps a site up after every start of the machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

_UNIT: Final = """\
[Unit]
Description=Affidavit site {name}
Wants=network-online.target
After=network-online.target time-sync.target

[Service]
User={user}
ExecStart={python} -P -m affidavit site up {name} --home {base}
ExecStop={python} -P -m affidavit site down {name} --home {base}
Restart=always
RestartSec=5
UMask=0077
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={base}
LimitCORE=0

[Install]
WantedBy=multi-user.target
"""


def unit_text(name: str, base: Path, user: str) -> str:
    """Return the unit of a site. A core dump could hold rows, so there is none."""
    return _UNIT.format(name=name, base=base.absolute(), user=user, python=sys.executable)


def write_unit(folder: Path, name: str, base: Path, user: str) -> Path:
    """Write the unit into `folder`, usually /etc/systemd/system."""
    path = folder / f"affidavit-site-{name}.service"
    path.write_text(unit_text(name, base, user), encoding="utf-8")
    return path
