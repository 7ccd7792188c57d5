"""Write results to one self-contained HTML page."""

from lightning_flatness.pages.hashing import DataHash, data_hash
from lightning_flatness.pages.page import save_html

__all__ = ["DataHash", "data_hash", "save_html"]
