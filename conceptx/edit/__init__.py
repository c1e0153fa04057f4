"""`Edit`, the artefact of every method, and what it is made of."""

from conceptx.edit.apply import Applied
from conceptx.edit.deltas import Columns, Delta, Dense, LowRank, Rows
from conceptx.edit.edit import Edit
from conceptx.edit.host import Fingerprint, Host, Part

__all__ = ["Applied", "Columns", "Delta", "Dense", "Edit", "Fingerprint", "Host", "LowRank", "Part", "Rows"]
