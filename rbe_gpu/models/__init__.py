"""Whole models: BERT-shaped encoders, from a model folder, a compressed file or the Hugging Face Hub."""

from __future__ import annotations

from .bert import BertEncoder
from .load import load

__all__ = ["BertEncoder", "load"]
