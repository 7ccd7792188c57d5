"""The versions of this package and of the packages that it needs, read without importing torch."""

from __future__ import annotations

__version__ = "0.1.0"

PACKAGES = ("torch", "lightning", "pytorch-lightning", "torchmetrics", "numpy")


def versions() -> str:
    """Return one line with the versions of this package, of ``PACKAGES`` and of Python, and the operating system.

    Example:
        >>> versions()  # doctest: +ELLIPSIS
        'lightning-flatness ..., torch ..., Python ...'
    """
    import platform

    packages = {"lightning-flatness": __version__} | {name: _installed(name) for name in PACKAGES}
    found = ", ".join(f"{name} {number}" for name, number in packages.items() if number)
    return f"{found}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"


def _installed(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
