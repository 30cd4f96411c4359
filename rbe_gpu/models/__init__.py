"""Whole models: BERT-shaped encoders, from a model folder, a Hugging Face id or a compressed file."""

from __future__ import annotations

from .bert import BertEncoder
from .load import load

__all__ = ["BertEncoder", "load"]
