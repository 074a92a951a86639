"""Models of transformers that see, hear, or do both beside text."""

from __future__ import annotations

from typing import Any

from tests.zoo.library import IMAGE, SPEECH, entries

STAGES: dict[str, Any] = {
    "image_size": 32, "patch_size": 4, "depths": [2, 1], "num_heads": [2, 4], "embed_dim": 32, "window_size": 4,
}  # fmt: skip
LEVIT: dict[str, Any] = {
    "image_size": 128, "hidden_sizes": [32, 64, 96], "num_attention_heads": [2, 4, 6], "depths": [1, 1, 1],
    "key_dim": [16, 16, 16],
}  # fmt: skip

EYES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("vit", "ViTConfig", "ViTModel", {}),
    ("deit", "DeiTConfig", "DeiTModel", {}),
    ("beit", "BeitConfig", "BeitModel", {"use_relative_position_bias": True}),
    ("data2vec-vision", "Data2VecVisionConfig", "Data2VecVisionModel", {"use_relative_position_bias": True}),
    ("dinov2", "Dinov2Config", "Dinov2Model", {}),
    ("dinov2-registers", "Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", {}),
    ("dinov3", "DINOv3ViTConfig", "DINOv3ViTModel", {}),
    ("ijepa", "IJepaConfig", "IJepaModel", {}),
    ("vit-msn", "ViTMSNConfig", "ViTMSNModel", {}),
    ("vit-mae", "ViTMAEConfig", "ViTMAEModel", {}),
    ("yolos", "YolosConfig", "YolosModel", {"image_size": [32, 32]}),
    ("clip-vision", "CLIPVisionConfig", "CLIPVisionModel", {}),
    ("siglip-vision", "SiglipVisionConfig", "SiglipVisionModel", {}),
    ("videomae", "VideoMAEConfig", "VideoMAEModel", {"num_frames": 4}),
    ("vivit", "VivitConfig", "VivitModel", {"num_frames": 4, "tubelet_size": [2, 8, 8]}),
    ("timesformer", "TimesformerConfig", "TimesformerModel", {"num_frames": 4}),
    (
        "sam-vision",
        "SamVisionConfig",
        "SamVisionModel",
        {"global_attn_indexes": [1], "window_size": 2, "output_channels": 16},
    ),
    (
        "hiera",
        "HieraConfig",
        "HieraModel",
        {
            "image_size": [32, 32],
            "embed_dim": 32,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "query_stride": [2, 2],
            "num_query_pool": 1,
            "patch_stride": [4, 4],
            "patch_size": [7, 7],
            "masked_unit_size": [4, 4],
        },
    ),
    (
        "segformer",
        "SegformerConfig",
        "SegformerModel",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [32, 64],
            "num_attention_heads": [2, 4],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
        },
    ),
    (
        "pvt",
        "PvtConfig",
        "PvtModel",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sequence_reduction_ratios": [2, 1],
            "hidden_sizes": [32, 64],
            "num_attention_heads": [2, 4],
            "patch_sizes": [4, 2],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
        },
    ),
    (
        "mobilevit",
        "MobileViTConfig",
        "MobileViTModel",
        {
            "hidden_sizes": [32, 48, 64],
            "neck_hidden_sizes": [8, 16, 16, 24, 32, 40, 64],
            "image_size": 128,
            "patch_size": 2,
        },
    ),
    ("dpt", "DPTConfig", "DPTModel", {}),
    ("resnet", "ResNetConfig", "ResNetModel", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}),
]

EARS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("wav2vec2", "Wav2Vec2Config", "Wav2Vec2Model", {}),
    ("hubert", "HubertConfig", "HubertModel", {}),
    ("wavlm", "WavLMConfig", "WavLMModel", {}),
    ("unispeech", "UniSpeechConfig", "UniSpeechModel", {}),
    ("unispeech-sat", "UniSpeechSatConfig", "UniSpeechSatModel", {}),
    (
        "data2vec-audio",
        "Data2VecAudioConfig",
        "Data2VecAudioModel",
        {"conv_pos_kernel_size": 5, "num_conv_pos_embeddings": 2},
    ),
    ("wav2vec2-conformer", "Wav2Vec2ConformerConfig", "Wav2Vec2ConformerModel", {}),
    ("sew", "SEWConfig", "SEWModel", {"squeeze_factor": 2}),
    ("wav2vec2-bert", "Wav2Vec2BertConfig", "Wav2Vec2BertModel", {"feature_projection_input_dim": 20}),
    (
        "audio-spectrogram",
        "ASTConfig",
        "ASTModel",
        {"max_length": 32, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8},
    ),
]

WHISPER: dict[str, Any] = {
    "vocab_size": 128, "num_mel_bins": 16, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
    "max_source_positions": 20, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip

SCRIBES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("whisper", "WhisperConfig", "WhisperForConditionalGeneration", {}),
    ("whisper-ctc", "WhisperConfig", "WhisperForAudioClassification", {}),
    (
        "speech_to_text",
        "Speech2TextConfig",
        "Speech2TextForConditionalGeneration",
        {"input_feat_per_channel": 16, "conv_channels": 32, "max_source_positions": 64},
    ),
    (
        "moonshine",
        "MoonshineConfig",
        "MoonshineForConditionalGeneration",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
            "encoder_num_key_value_heads": 4,
            "decoder_num_key_value_heads": 4,
        },
    ),
]

WORDS: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 128,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EYE: dict[str, Any] = dict(IMAGE)
TWO: dict[str, Any] = {"text_config": WORDS, "vision_config": EYE}

BOTH: list[tuple[str, str, str, dict[str, Any]]] = [
    ("clip", "CLIPConfig", "CLIPModel", TWO),
    ("siglip", "SiglipConfig", "SiglipModel", TWO),
    ("altclip", "AltCLIPConfig", "AltCLIPModel", TWO),
    ("chinese_clip", "ChineseCLIPConfig", "ChineseCLIPModel", TWO),
    (
        "blip",
        "BlipConfig",
        "BlipForConditionalGeneration",
        {**TWO, "text_config": {**WORDS, "encoder_hidden_size": 64}},
    ),
    ("git", "GitConfig", "GitForCausalLM", {**WORDS, "vision_config": EYE}),
    ("vilt", "ViltConfig", "ViltModel", {**WORDS, **EYE}),
    (
        "bridgetower",
        "BridgeTowerConfig",
        "BridgeTowerModel",
        {**WORDS, "text_config": WORDS, "vision_config": {**EYE, "hidden_size": 64}},
    ),
    (
        "lxmert",
        "LxmertConfig",
        "LxmertModel",
        {**WORDS, "l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 20},
    ),
    (
        "flava",
        "FlavaConfig",
        "FlavaModel",
        {
            "text_config": WORDS,
            "image_config": EYE,
            "multimodal_config": {**WORDS},
            "hidden_size": 64,
            "projection_dim": 32,
        },
    ),
    ("visual_bert", "VisualBertConfig", "VisualBertModel", {**WORDS, "visual_embedding_dim": 20}),
]

EAGER = (
    "timesformer", "swinv2", "hiera", "pvt", "mobilevit", "levit", "resnet", "wavlm", "speech_to_text", "blip",
    "git", "vilt", "bridgetower", "lxmert", "flava", "visual_bert", "mobilevit-default", "levit-default",
)  # fmt: skip
"""Types that have no sdpa."""

ONLY = dict.fromkeys(EAGER, "eager")

WINDOWS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("swin", "SwinConfig", "SwinModel", {}),
    ("swinv2", "Swinv2Config", "Swinv2Model", {}),
]

DEFAULTS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("mobilevit-default", "MobileViTConfig", "MobileViTModel", {}),
    ("levit-default", "LevitConfig", "LevitModel", {}),
]
"""At the sizes that the type is shipped with."""

VISION = [
    *entries("vision", IMAGE, EYES, ONLY),
    *entries("vision", STAGES, WINDOWS, ONLY),
    *entries("vision", LEVIT, [("levit", "LevitConfig", "LevitModel", {})], ONLY),
    *entries("vision", {}, DEFAULTS, ONLY),
]
AUDIO = [*entries("audio", SPEECH, EARS, ONLY), *entries("audio", WHISPER, SCRIBES, ONLY)]
MULTIMODAL = entries("multimodal", {}, BOTH, ONLY)
