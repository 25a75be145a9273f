"""The CUDA kernels on the CPU: their sources, compiled by a host compiler, run on `machine.h`.

Headers of `kernels/csrc` that hold PTX or launch kernels have their functions in `emulated_*.h`.
"""
