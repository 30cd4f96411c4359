"""Vectors of files of texts, too many for one process (docs/scale.md)."""

from __future__ import annotations

from .run import SHARD_TEXTS, EmbedSummary, embed_files
from .text_files import text_files

__all__ = ["SHARD_TEXTS", "EmbedSummary", "embed_files", "text_files"]
