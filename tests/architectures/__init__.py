"""Encoders of every supported `model_type` against the hidden states of transformers, recorded by `record.py`."""
