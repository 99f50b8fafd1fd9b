"""Cards for MindSpore Hub and the tools that make and check them."""
