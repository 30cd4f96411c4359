"""The CUDA sources compiled by a C++ compiler, for the tests: threads are fibers, blocks run one by one."""
