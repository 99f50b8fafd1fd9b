"""Operations whose fastest form depends on the device, and our own kernels for the CPU."""
