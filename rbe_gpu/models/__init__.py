"""Whole models, encoders and decoders: from a folder, a compressed file, GGUF or the Hugging Face Hub."""

from __future__ import annotations

from .bert import BertEncoder
from .decoder import Decoder
from .decoder_embedder import DecoderEmbedder
from .load import load

__all__ = ["BertEncoder", "Decoder", "DecoderEmbedder", "load"]
