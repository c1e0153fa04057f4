"""`Edit`, the artefact of every method, and what it is made of."""

from conceptx.edit.apply import Applied
from conceptx.edit.deltas import Delta, Dense, LowRank, Rows
from conceptx.edit.edit import Edit
from conceptx.edit.host import Fingerprint, Host

__all__ = ["Applied", "Delta", "Dense", "Edit", "Fingerprint", "Host", "LowRank", "Rows"]
