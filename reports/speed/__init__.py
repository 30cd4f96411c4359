"""Speed, memory and size: every op and a whole model beside NumPy, PyTorch and ONNX Runtime on the CPU."""
