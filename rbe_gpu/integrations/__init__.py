"""Compressed weights inside other libraries: `integrations.torch`, `integrations.sentence_transformers`.

Both need PyTorch (extra `torch`), which nothing else of the package imports but `train`.
"""
