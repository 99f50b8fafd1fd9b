"""Cards for MindSpore Hub, and tools that write and check them."""
