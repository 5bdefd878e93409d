"""Licences by the names that standards have for them."""

from __future__ import annotations

import re

_SPDX = (
    "AFL-3.0", "AGPL-3.0-only", "Apache-2.0", "Artistic-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0",
    "CC-BY-4.0", "CC-BY-NC-4.0", "CC-BY-NC-ND-4.0", "CC-BY-NC-SA-4.0", "CC-BY-SA-4.0", "CDLA-Permissive-2.0", "EPL-2.0",
    "EUPL-1.1", "EUPL-1.2", "GPL-3.0-only", "GPL-3.0-or-later", "ISC", "LGPL-3.0-only", "MIT", "MPL-2.0", "MS-PL",
    "NCSA", "ODC-By-1.0", "OSL-3.0", "PDDL-1.0", "Unlicense", "WTFPL", "Zlib",
)  # fmt: skip
_KNOWN = {name.lower(): name for name in _SPDX} | {"odc-by": "ODC-By-1.0", "pddl": "PDDL-1.0"}


def spdx_id(licence: str) -> str | None:
    """The identifier of SPDX's list, in its spelling, or None for what is not among the common ones."""
    return _KNOWN.get(licence.strip().lower())


def licence_ref(text: str) -> str:
    """A name for terms that SPDX's list does not have: `LicenseRef-limbeck-...`."""
    return f"LicenseRef-limbeck-{re.sub(r'[^A-Za-z0-9.]+', '-', text).strip('-') or 'unnamed'}"


def address(text: str) -> str:
    """An address of the register, which leaves `https://` out, as a URI."""
    return text if "://" in text else f"https://{text}"
