"""A systemd unit that keeps a site up after every start of the machine."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

from clients.errors import HomeError

_PLAIN: Final = re.compile(r"/[A-Za-z0-9/._+@:-]*")
_USER: Final = re.compile(r"[a-z_][a-z0-9_-]{0,31}")

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
    """Return the unit of a site. A core dump could hold rows, so there is none.

    Raises:
        HomeError: a path or the user is nothing that a unit can name as it stands.
    """
    for path in (base.absolute(), Path(sys.executable)):
        if not _PLAIN.fullmatch(str(path)):
            raise HomeError(
                path, "has characters that systemd reads in a way of its own", "choose another place"
            )
    if not _USER.fullmatch(user):
        raise HomeError(base, f"user {user[:40]!r} is no user's name", "give --user a name such as affidavit")
    return _UNIT.format(name=name, base=base.absolute(), user=user, python=sys.executable)


def write_unit(folder: Path, name: str, base: Path, user: str) -> Path:
    """Write the unit into `folder`, usually /etc/systemd/system."""
    path = folder / f"affidavit-site-{name}.service"
    path.write_text(unit_text(name, base, user), encoding="utf-8")
    return path
