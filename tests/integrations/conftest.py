"""transformers imports torchvision, whose binary does not load beside the CPU build of torch: its schemas are declared."""

import contextlib

with contextlib.suppress(ImportError):
    from sweep.torchvision_schemas import torchvision_models

    torchvision_models()
