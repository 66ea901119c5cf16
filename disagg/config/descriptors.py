"""Open files: how many this process may have, raised as far as it may raise them itself."""

from __future__ import annotations

import resource
from typing import Final

MOST_DESCRIPTORS: Final = 1 << 20  # Linux's own default ceiling; more has no use and slows tools that walk the range


def raise_descriptor_limit() -> int:
    """Raise the soft limit to the hard one, and return what holds now.

    1024, the usual soft limit, is a bound for programs that use select(); this one does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # a sandbox may forbid what the limits allow: the soft one goes on to hold
            return soft
        return wanted
    return MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
