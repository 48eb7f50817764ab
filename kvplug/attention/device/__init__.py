"""The backend for CUDA: windows cut on the host, pages selected and attended to by ``kernels/``."""
