"""The CUDA kernels on the CPU: their sources compiled against `emulated_device.h`."""
