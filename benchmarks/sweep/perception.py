"""Images, sound, and images with text."""

from __future__ import annotations

from typing import Any

import torch

from sweep.entry import Entry, floats, integers
from sweep.hub import VOCABULARY, hub, named, pixels, wave

VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
SWIN: dict[str, Any] = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
SPEECH: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 4, 2],
    "conv_kernel": [10, 4, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _ids(batch: int, generator: torch.Generator) -> torch.Tensor:
    return integers(generator, VOCABULARY, batch, 10, low=4)


def _image(batch: int, generator: torch.Generator) -> torch.Tensor:
    return floats(generator, batch, 3, 32, 32)


def entries() -> list[Entry]:
    """All of them."""
    return [*vision(), *audio(), *multimodal()]


def vision() -> list[Entry]:
    """Images."""
    kind = "vision"
    stages = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    return [
        hub("vit", kind, "ViTForImageClassification", VIT, pixels()),
        hub("deit", kind, "DeiTForImageClassificationWithTeacher", VIT, pixels()),
        hub("beit", kind, "BeitForImageClassification", {**VIT, "use_relative_position_bias": True}, pixels()),
        hub("data2vec-vision", kind, "Data2VecVisionForImageClassification", {**VIT, "use_shared_relative_position_bias": True}, pixels()),
        hub("dinov2", kind, "Dinov2ForImageClassification", VIT, pixels()),
        hub("ijepa", kind, "IJepaForImageClassification", VIT, pixels()),
        hub("vit-msn", kind, "ViTMSNForImageClassification", VIT, pixels()),
        hub("swin", kind, "SwinForImageClassification", SWIN, pixels()),
        hub("swinv2", kind, "Swinv2ForImageClassification", SWIN, pixels()),
        hub("donut-swin", kind, "DonutSwinModel", SWIN, pixels()),
        hub("convnext", kind, "ConvNextForImageClassification", {**stages, "num_stages": 4}, pixels(64)),
        hub("convnextv2", kind, "ConvNextV2ForImageClassification", {**stages, "num_stages": 4}, pixels(64)),
        hub("resnet", kind, "ResNetForImageClassification", {**stages, "embedding_size": 8, "layer_type": "basic"}, pixels(64)),
        hub("resnet-bottleneck", kind, "ResNetForImageClassification", {**stages, "embedding_size": 8}, pixels(64)),
        hub("regnet", kind, "RegNetForImageClassification", {**stages, "embedding_size": 8, "groups_width": 4}, pixels(64)),
        hub("poolformer", kind, "PoolFormerForImageClassification", {**stages, "mlp_ratio": 2.0}, pixels(64)),
        hub(
            "segformer",
            kind,
            "SegformerForSemanticSegmentation",
            {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 16},
            pixels(64),
        ),
        hub(
            "glpn",
            kind,
            "GLPNForDepthEstimation",
            {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 16},
            pixels(64),
        ),
        hub(
            "pvt",
            kind,
            "PvtForImageClassification",
            {
                "image_size": 64,
                "depths": [1, 1, 1, 1],
                "hidden_sizes": [8, 16, 24, 32],
                "num_attention_heads": [1, 2, 3, 4],
                "mlp_ratios": [2, 2, 2, 2],
            },
            pixels(64),
        ),
        hub(
            "pvt-v2",
            kind,
            "PvtV2ForImageClassification",
            {
                "image_size": 64,
                "depths": [1, 1, 1, 1],
                "hidden_sizes": [8, 16, 24, 32],
                "num_attention_heads": [1, 2, 3, 4],
                "mlp_ratios": [2, 2, 2, 2],
            },
            pixels(64),
        ),
        hub(
            "mobilevit",
            kind,
            "MobileViTForImageClassification",
            {
                "image_size": 64,
                "hidden_sizes": [16, 24, 32],
                "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
                "num_attention_heads": 4,
                "mlp_ratio": 2.0,
            },
            pixels(64),
        ),
        hub("mobilevitv2", kind, "MobileViTV2ForImageClassification", {"image_size": 64, "width_multiplier": 0.25}, pixels(64)),
        hub("mobilenet-v1", kind, "MobileNetV1ForImageClassification", {"depth_multiplier": 0.25, "image_size": 64}, pixels(64)),
        hub("mobilenet-v2", kind, "MobileNetV2ForImageClassification", {"depth_multiplier": 0.25, "image_size": 64}, pixels(64)),
        hub(
            "efficientnet",
            kind,
            "EfficientNetForImageClassification",
            {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
            pixels(64),
        ),
        hub(
            "levit",
            kind,
            "LevitForImageClassification",
            {
                "image_size": 64,
                "hidden_sizes": [16, 24, 32],
                "num_attention_heads": [2, 3, 4],
                "depths": [1, 1, 1],
                "key_dim": [8, 8, 8],
                "attention_ratio": [2, 2, 2],
                "mlp_ratio": [2, 2, 2],
            },
            pixels(64),
        ),
        hub(
            "focalnet",
            kind,
            "FocalNetForImageClassification",
            {
                "image_size": 32,
                "patch_size": 4,
                "embed_dim": 16,
                "depths": [1, 1],
                "hidden_sizes": [16, 32],
                "focal_levels": [2, 2],
                "focal_windows": [3, 3],
            },
            pixels(),
        ),
        hub(
            "cvt",
            kind,
            "CvtForImageClassification",
            {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
            pixels(64),
        ),
        hub(
            "swiftformer",
            kind,
            "SwiftFormerForImageClassification",
            {"image_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32]},
            pixels(64),
        ),
        hub("bit", kind, "BitForImageClassification", {**stages, "embedding_size": 8, "num_groups": 4}, pixels(64)),
        hub(
            "dpt",
            kind,
            "DPTForDepthEstimation",
            {
                **VIT,
                "num_hidden_layers": 4,
                "backbone_out_indices": [0, 1, 2, 3],
                "neck_hidden_sizes": [8, 8, 16, 16],
                "fusion_hidden_size": 16,
                "is_hybrid": False,
            },
            pixels(),
        ),
        hub("yolos", kind, "YolosForObjectDetection", {**VIT, "image_size": [32, 32], "num_detection_tokens": 4}, pixels()),
        hub(
            "vitdet",
            kind,
            "VitDetModel",
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "mlp_ratio": 2},
            pixels(),
        ),
        hub(
            "hiera",
            kind,
            "HieraForImageClassification",
            {
                "image_size": [32, 32],
                "patch_size": [7, 7],
                "patch_stride": [4, 4],
                "patch_padding": [3, 3],
                "depths": [1, 1],
                "embed_dim": 16,
                "num_heads": [1, 2],
                "query_stride": [2, 2],
                "num_query_pool": 1,
                "masked_unit_size": [4, 4],
                "mlp_ratio": 2.0,
            },
            pixels(),
        ),
        hub(
            "swin2sr",
            kind,
            "Swin2SRForImageSuperResolution",
            {"image_size": 16, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4, "upscale": 2},
            pixels(16),
        ),
    ]


def audio() -> list[Entry]:
    """Waves and spectrograms."""
    kind = "audio"
    whisper = {
        "vocab_size": VOCABULARY,
        "num_mel_bins": 8,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_source_positions": 16,
        "max_target_positions": 16,
        "use_cache": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 3,
    }
    return [
        hub("wav2vec2", kind, "Wav2Vec2ForCTC", SPEECH, wave()),
        hub("wav2vec2-layer-norm", kind, "Wav2Vec2ForCTC", {**SPEECH, "feat_extract_norm": "layer", "do_stable_layer_norm": True}, wave()),
        hub("hubert", kind, "HubertForCTC", SPEECH, wave()),
        hub("wavlm", kind, "WavLMForCTC", SPEECH, wave()),
        hub("data2vec-audio", kind, "Data2VecAudioForCTC", {**SPEECH, "conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2}, wave()),
        hub("unispeech", kind, "UniSpeechForCTC", SPEECH, wave()),
        hub("sew", kind, "SEWForCTC", {**SPEECH, "squeeze_factor": 2}, wave()),
        hub(
            "whisper",
            kind,
            "WhisperForConditionalGeneration",
            whisper,
            named(input_features=lambda b, g: floats(g, b, 8, 32), decoder_input_ids=lambda b, g: integers(g, VOCABULARY, b, 6, low=4)),
        ),
        hub("whisper-classifier", kind, "WhisperForAudioClassification", whisper, named(input_features=lambda b, g: floats(g, b, 8, 32))),
        hub(
            "ast",
            kind,
            "ASTForAudioClassification",
            {
                **{k: VIT[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")},
                "frequency_stride": 8,
                "time_stride": 8,
                "max_length": 32,
                "num_mel_bins": 16,
            },
            named(input_values=lambda b, g: floats(g, b, 32, 16)),
        ),
        hub(
            "speech-to-text",
            kind,
            "Speech2TextForConditionalGeneration",
            {
                **{k: v for k, v in whisper.items() if k not in ("num_mel_bins", "max_source_positions")},
                "max_source_positions": 64,
                "input_feat_per_channel": 8,
                "conv_channels": 16,
                "num_conv_layers": 2,
                "conv_kernel_sizes": [3, 3],
            },
            named(input_features=lambda b, g: floats(g, b, 32, 8), decoder_input_ids=lambda b, g: integers(g, VOCABULARY, b, 6, low=4)),
        ),
        hub(
            "encodec",
            kind,
            "EncodecModel",
            {
                "num_filters": 8,
                "hidden_size": 16,
                "codebook_size": 16,
                "codebook_dim": 16,
                "upsampling_ratios": [4, 2],
                "num_lstm_layers": 1,
                "sampling_rate": 1600,
                "target_bandwidths": [1.5],
            },
            named(input_values=lambda b, g: floats(g, b, 1, 160)),
        ),
    ]


def multimodal() -> list[Entry]:
    """Images with text."""
    kind = "multimodal"
    pair = named(input_ids=_ids, pixel_values=_image)
    return [
        hub("clip", kind, "CLIPModel", {"text_config": TEXT, "vision_config": VIT, "projection_dim": 16}, pair),
        hub("clip-vision", kind, "CLIPVisionModelWithProjection", {**VIT, "projection_dim": 16}, pixels()),
        hub("siglip", kind, "SiglipModel", {"text_config": {**TEXT, "max_position_embeddings": 10}, "vision_config": VIT}, pair),
        hub("chinese-clip", kind, "ChineseCLIPModel", {"text_config": TEXT, "vision_config": VIT, "projection_dim": 16}, pair),
        hub(
            "altclip", kind, "AltCLIPModel", {"text_config": {**TEXT, "project_dim": 16}, "vision_config": VIT, "projection_dim": 16}, pair
        ),
        hub(
            "blip",
            kind,
            "BlipForImageTextRetrieval",
            {
                "text_config": {**TEXT, "encoder_hidden_size": 32},
                "vision_config": VIT,
                "projection_dim": 16,
                "image_text_hidden_size": 16,
            },
            pair,
        ),
        hub("flava-image", kind, "FlavaImageModel", VIT, pixels()),
        hub(
            "groupvit",
            kind,
            "GroupViTVisionModel",
            {**VIT, "depths": [1, 1], "num_group_tokens": [4, 0], "num_output_groups": [4, 2], "num_hidden_layers": 2},
            pixels(),
        ),
        hub("git", kind, "GitModel", {**TEXT, "vision_config": VIT, "use_cache": False}, pair),
        hub(
            "vilt",
            kind,
            "ViltModel",
            {**TEXT, "image_size": 32, "patch_size": 8},
            named(input_ids=_ids, pixel_values=_image, pixel_mask=lambda b, g: torch.ones(b, 32, 32, dtype=torch.int64)),
        ),
        hub(
            "llava",
            kind,
            "LlavaForConditionalGeneration",
            {
                "text_config": {"model_type": "llama", **TEXT, "use_cache": False},
                "vision_config": {"model_type": "clip_vision_model", **VIT},
                "image_token_index": 3,
                "vision_feature_layer": -1,
            },
            named(input_ids=lambda b, g: torch.cat([torch.full((b, 16), 3), integers(g, VOCABULARY, b, 4, low=4)], 1), pixel_values=_image),
        ),
    ]
