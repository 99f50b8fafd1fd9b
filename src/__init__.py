"""Masked image modelling on MindSpore: SimMIM, FastMIM and manifold distillation for ViT and Swin."""

__version__ = "0.1.0"
