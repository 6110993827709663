"""How many descriptors dialogd may have open: as many as its configuration can need, as far as the system lets it."""

import resource

import structlog

from dialog_supervisor.config import Config

_OWN = 64  # listeners, store, templates, the control API, and files that are open for a moment
_OF_A_CALL = 8  # beside its connections: link, outputs, stack, pidfd; and the other ends of these while its worker begins

RESERVE = 32  # which no new connection takes: for dialogctl, for files, and for the workers of calls that there are

log = structlog.get_logger("dialogd")


def needed(config: Config) -> int:
    """Return how many there are when there are as many calls and connections as there may be."""
    return _OWN + config.gateway.max_connections + _OF_A_CALL * config.calls.max_calls


def scarce(newest: int) -> bool:
    """Whether so few are left that the newest, which has the lowest number that was free, is to be given back."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit != resource.RLIM_INFINITY and newest >= limit - RESERVE


def permit(config: Config) -> None:
    """Raise this process's own limit to what is needed, and say so where it may not.

    Not to whatever the system permits: templates inherit it, and programs that they start may look at every one.
    """
    wanted = needed(config)
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    if before != resource.RLIM_INFINITY and before < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
        log.info("the limit of descriptors is raised", limit=limit, before=before)
    if limit < wanted:
        log.warning(
            "there may be too few descriptors for all calls",
            limit=limit,
            needed=wanted,
            max_calls=config.calls.max_calls,
            max_connections=config.gateway.max_connections,
            remedy="raise LimitNOFILE, or ulimit -Hn, or lower calls.max_calls",
        )
