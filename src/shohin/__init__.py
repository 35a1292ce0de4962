"""Shohin makes a PyTorch model fit the device it must run on."""

__version__ = "0.1.0"
