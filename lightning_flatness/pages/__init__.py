"""One self-contained HTML page of results."""

from lightning_flatness.pages.hashing import DataHash, data_hash

__all__ = ["DataHash", "data_hash"]
