"""Every schedule by name. Adding one is a file in this folder and a line here."""

from models.schedule import Dense, Fused

__all__ = ["Dense", "Fused"]
