"""Every torchvision model and many transformers architectures, cut and compared with the oracle. Run with ``make sweep``."""
