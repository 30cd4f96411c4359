"""Rate-distortion training: the integers of a compressed encoder, trained to say what the dense one says.

`distill.py` has the public function; PyTorch computes gradients (extra `train`) and is imported by nothing else.
"""
