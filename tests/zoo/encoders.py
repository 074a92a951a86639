"""Encoders, and models with an encoder and a decoder, of transformers."""

from __future__ import annotations

from typing import Any

from tests.zoo.library import SEQ2SEQ, T5, TEXT, entries

PERCEIVER: dict[str, Any] = {
    "num_latents": 6, "d_latents": 64, "d_model": 64, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
    "num_cross_attention_heads": 4, "qk_channels": 64, "v_channels": 64,
}  # fmt: skip
FUNNEL: dict[str, Any] = {
    "vocab_size": 128, "block_sizes": [1, 1], "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 128,
    "num_decoder_layers": 1,
}  # fmt: skip
PROPHET: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "num_encoder_layers": 2, "num_decoder_layers": 2, "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip

UNGROUPED = dict.fromkeys(("q_groups", "k_groups", "v_groups", "post_attention_groups"), 1)

BERTS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("bert", "BertConfig", "BertModel", {}),
    ("roberta", "RobertaConfig", "RobertaModel", {}),
    ("xlm-roberta", "XLMRobertaConfig", "XLMRobertaModel", {}),
    ("xlm-roberta-xl", "XLMRobertaXLConfig", "XLMRobertaXLModel", {}),
    ("roberta-prelayernorm", "RobertaPreLayerNormConfig", "RobertaPreLayerNormModel", {}),
    ("albert", "AlbertConfig", "AlbertModel", {"embedding_size": 32}),
    ("electra", "ElectraConfig", "ElectraModel", {"embedding_size": 32}),
    ("distilbert", "DistilBertConfig", "DistilBertModel", {"hidden_dim": 128}),
    ("camembert", "CamembertConfig", "CamembertModel", {}),
    ("mpnet", "MPNetConfig", "MPNetModel", {}),
    ("modernbert", "ModernBertConfig", "ModernBertModel", {"local_attention": 4, "global_attn_every_n_layers": 2}),
    ("nomic_bert", "NomicBertConfig", "NomicBertModel", {}),
    ("eurobert", "EuroBertConfig", "EuroBertModel", {}),
    ("deberta", "DebertaConfig", "DebertaModel", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    ("deberta-v2", "DebertaV2Config", "DebertaV2Model", {}),
    ("esm", "EsmConfig", "EsmModel", {"position_embedding_type": "rotary"}),
    ("squeezebert", "SqueezeBertConfig", "SqueezeBertModel", {"embedding_size": 64, **UNGROUPED}),
    ("convbert", "ConvBertConfig", "ConvBertModel", {"embedding_size": 32}),
    ("flaubert", "FlaubertConfig", "FlaubertModel", {"emb_dim": 64, "n_layers": 2, "n_heads": 4}),
    ("fnet", "FNetConfig", "FNetModel", {}),
    ("ibert", "IBertConfig", "IBertModel", {}),
    ("layoutlm", "LayoutLMConfig", "LayoutLMModel", {}),
    ("markuplm", "MarkupLMConfig", "MarkupLMModel", {}),
    ("megatron-bert", "MegatronBertConfig", "MegatronBertModel", {}),
    ("mobilebert", "MobileBertConfig", "MobileBertModel", {"embedding_size": 32, "intra_bottleneck_size": 64}),
    ("mra", "MraConfig", "MraModel", {}),
    ("nystromformer", "NystromformerConfig", "NystromformerModel", {"num_landmarks": 10, "segment_means_seq_len": 10}),
    ("rembert", "RemBertConfig", "RemBertModel", {"input_embedding_size": 32, "output_embedding_size": 32}),
    ("roformer", "RoFormerConfig", "RoFormerModel", {"embedding_size": 64}),
    ("ernie", "ErnieConfig", "ErnieModel", {}),
    ("data2vec-text", "Data2VecTextConfig", "Data2VecTextModel", {}),
    ("splinter", "SplinterConfig", "SplinterModel", {}),
    ("canine", "CanineConfig", "CanineModel", {"downsampling_rate": 2, "local_transformer_stride": 4}),
    ("longformer", "LongformerConfig", "LongformerModel", {"attention_window": 4}),
    ("perceiver", "PerceiverConfig", "PerceiverForMaskedLM", PERCEIVER),
    ("clip-text", "CLIPTextConfig", "CLIPTextModel", {}),
    ("siglip-text", "SiglipTextConfig", "SiglipTextModel", {}),
]

PAIRS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("bart", "BartConfig", "BartForConditionalGeneration", {}),
    ("mbart", "MBartConfig", "MBartForConditionalGeneration", {}),
    ("marian", "MarianConfig", "MarianMTModel", {}),
    ("pegasus", "PegasusConfig", "PegasusForConditionalGeneration", {}),
    ("pegasus_x", "PegasusXConfig", "PegasusXForConditionalGeneration", {"block_size": 4, "num_global_tokens": 3}),
    ("blenderbot", "BlenderbotConfig", "BlenderbotForConditionalGeneration", {}),
    ("blenderbot-small", "BlenderbotSmallConfig", "BlenderbotSmallForConditionalGeneration", {}),
    ("m2m_100", "M2M100Config", "M2M100ForConditionalGeneration", {}),
    ("plbart", "PLBartConfig", "PLBartForConditionalGeneration", {}),
    ("nllb-moe", "NllbMoeConfig", "NllbMoeForConditionalGeneration", {"num_experts": 4}),
    ("led", "LEDConfig", "LEDForConditionalGeneration", {"attention_window": 4, "max_encoder_position_embeddings": 64}),
    (
        "bigbird_pegasus",
        "BigBirdPegasusConfig",
        "BigBirdPegasusForConditionalGeneration",
        {"attention_type": "original_full"},
    ),
    (
        "fsmt",
        "FSMTConfig",
        "FSMTForConditionalGeneration",
        {"src_vocab_size": 128, "tgt_vocab_size": 128, "langs": ["a", "b"]},
    ),
    ("mvp", "MvpConfig", "MvpForConditionalGeneration", {}),
]

TS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("t5", "T5Config", "T5ForConditionalGeneration", {}),
    ("t5-gated", "T5Config", "T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu"}),
    ("mt5", "MT5Config", "MT5ForConditionalGeneration", {}),
    ("umt5", "UMT5Config", "UMT5ForConditionalGeneration", {}),
    ("longt5", "LongT5Config", "LongT5ForConditionalGeneration", {}),
    (
        "switch_transformers",
        "SwitchTransformersConfig",
        "SwitchTransformersForConditionalGeneration",
        {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    ),
    ("t5-encoder", "T5Config", "T5EncoderModel", {}),
]

EAGER = (
    "mpnet", "deberta", "deberta-v2", "squeezebert", "convbert", "flaubert", "fnet", "ibert", "markuplm",
    "megatron-bert", "mra", "nystromformer", "rembert", "roformer", "splinter", "canine", "longformer",
    "perceiver", "pegasus_x", "nllb-moe", "led", "bigbird_pegasus", "fsmt", "mvp", "longt5", "switch_transformers",
    "funnel", "prophetnet", "squeezebert-default",
)  # fmt: skip
"""Types that have no sdpa."""

ONLY = dict.fromkeys(EAGER, "eager")

ENCODERS = [
    *entries("encoder", TEXT, BERTS, ONLY),
    # its projections are convolutions in four groups
    *entries("encoder", {}, [("squeezebert-default", "SqueezeBertConfig", "SqueezeBertModel", {})], ONLY),
    *entries("encoder", FUNNEL, [("funnel", "FunnelConfig", "FunnelModel", {})], ONLY),
]
SEQ2SEQS = [
    *entries("seq2seq", SEQ2SEQ, PAIRS, ONLY),
    *entries("seq2seq", T5, TS, ONLY),
    *entries("seq2seq", PROPHET, [("prophetnet", "ProphetNetConfig", "ProphetNetForConditionalGeneration", {})], ONLY),
]
