"""Rate-distortion training: the integers of a compressed model, trained so that its vectors, or its predictions, are
those of the dense one.

`distill.py` has the public function; PyTorch computes gradients (extra `train`) and is imported by nothing else.
"""
