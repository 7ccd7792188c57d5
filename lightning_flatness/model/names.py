"""Names of modules and tensors, without what ``torch.compile`` adds, and patterns that match them."""

from __future__ import annotations

from fnmatch import fnmatchcase

# What torch.compile puts in front of the names of a module that it wraps.
COMPILED = "_orig_mod"


def plain_name(name: str) -> str:
    """The name of a module or tensor without what ``torch.compile`` adds to it.

    Example:
        >>> plain_name("net._orig_mod.conv1"), plain_name("net.conv1._orig_mod")
        ('net.conv1', 'net.conv1')
    """
    return ".".join(part for part in name.split(".") if part != COMPILED)


def lies_in(pattern: str, name: str) -> bool:
    """Whether a name or glob pattern is that of a tensor or of one of the modules around it.

    Example:
        >>> lies_in("net", "net.conv1.weight"), lies_in("*.bias", "net.conv1.weight")
        (True, False)
    """
    parts = plain_name(name).split(".")
    return any(fits(plain_name(pattern), ".".join(parts[:end])) for end in range(1, len(parts) + 1))


def fits(pattern: str, name: str) -> bool:
    """Whether a name or glob pattern matches a plain name."""
    return name == pattern or fnmatchcase(name, pattern)
