"""Attributes that describe parameters: read by users, by other libraries and by a module's own checks, seldom by forward."""

from __future__ import annotations

from torch import Tensor, nn


def describe(model: nn.Module) -> None:
    """Sets the descriptive attributes of torch's own layers, and of layers that name them alike, from their tensors."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
        if isinstance(module, nn.modules.batchnorm._NormBase):
            held = [t for t in (weight, module.running_mean) if isinstance(t, Tensor)]
            module.num_features = held[0].shape[0] if held else module.num_features
        elif isinstance(module, nn.RNNBase):
            _recurrent(module)
        elif isinstance(module, nn.RNNCellBase):
            module.hidden_size, module.input_size = module.weight_hh.shape[1], module.weight_ih.shape[1]
        elif isinstance(module, nn.Transformer):
            _transformer(module)
        elif not shape:
            continue
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = shape
        elif isinstance(module, nn.Bilinear):
            module.out_features, module.in1_features, module.in2_features = shape
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            module.out_channels, module.in_channels = shape[0], shape[1] * module.groups
        elif isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            module.in_channels, module.out_channels = shape[0], shape[1] * module.groups
        elif isinstance(module, nn.GroupNorm):
            module.num_groups = shape[0] if module.num_groups == module.num_channels else module.num_groups
            module.num_channels = shape[0]
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.normalized_shape = shape
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            module.num_embeddings, module.embedding_dim = shape
        elif isinstance(module, nn.PReLU):
            module.num_parameters = shape[0]
        elif {"nf", "nx"} <= vars(module).keys() and len(shape) == 2:
            module.nx, module.nf = shape  # type: ignore[assignment]


def _recurrent(module: nn.RNNBase) -> None:
    columns = module.get_parameter("weight_hh_l0").shape[1]
    module.input_size = module.get_parameter("weight_ih_l0").shape[1]
    module.hidden_size = module.get_parameter("weight_hr_l0").shape[1] if module.proj_size else columns
    module.proj_size = columns if module.proj_size else 0


def _transformer(module: nn.Transformer) -> None:
    """torch's own class checks its width; a custom encoder is not known."""
    layers = getattr(module.encoder, "layers", [])
    attention = getattr(layers[0], "self_attn", None) if len(layers) else None
    if isinstance(attention, nn.MultiheadAttention):
        module.d_model, module.nhead = attention.embed_dim, attention.num_heads
