"""In a package, a copy of qwenspec.ir.shares, by which plans are made too."""

from qwenspec.ir.shares import Piece, Shared, cut, explanation, obstacles, read_entry, read_shared

__all__ = ["Piece", "Shared", "cut", "explanation", "obstacles", "read_entry", "read_shared"]
