"""Causal language models of transformers."""

from __future__ import annotations

from typing import Any

from tests.zoo.library import MLA, MOE, TEXT, entries

GQA: dict[str, Any] = {"num_key_value_heads": 2}
HEAD16: dict[str, Any] = {"head_dim": 16}

DOTS: dict[str, Any] = {
    **HEAD16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip

ROWS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("llama", "LlamaConfig", "LlamaForCausalLM", {}),
    ("llama-gqa", "LlamaConfig", "LlamaForCausalLM", GQA),
    ("mistral", "MistralConfig", "MistralForCausalLM", {"sliding_window": 4}),
    ("mixtral", "MixtralConfig", "MixtralForCausalLM", MOE),
    ("qwen2", "Qwen2Config", "Qwen2ForCausalLM", {}),
    ("qwen2-gqa", "Qwen2Config", "Qwen2ForCausalLM", GQA),
    ("qwen2_moe", "Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**MOE, "shared_expert_intermediate_size": 32}),
    ("qwen3", "Qwen3Config", "Qwen3ForCausalLM", HEAD16),
    ("qwen3-gqa", "Qwen3Config", "Qwen3ForCausalLM", {**HEAD16, **GQA}),
    ("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**MOE, **HEAD16}),
    ("gemma", "GemmaConfig", "GemmaForCausalLM", HEAD16),
    ("gemma2", "Gemma2Config", "Gemma2ForCausalLM", {**HEAD16, "sliding_window": 4}),
    ("gemma3_text", "Gemma3TextConfig", "Gemma3ForCausalLM", {**HEAD16, "sliding_window": 4}),
    ("phi", "PhiConfig", "PhiForCausalLM", {}),
    ("phi3", "Phi3Config", "Phi3ForCausalLM", {}),
    ("phimoe", "PhimoeConfig", "PhimoeForCausalLM", MOE),
    ("gpt2", "GPT2Config", "GPT2LMHeadModel", {}),
    ("openai-gpt", "OpenAIGPTConfig", "OpenAIGPTLMHeadModel", {}),
    ("gpt_neo", "GPTNeoConfig", "GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 1]], "window_size": 4}),
    ("gpt_neox", "GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    ("gpt_neox_japanese", "GPTNeoXJapaneseConfig", "GPTNeoXJapaneseForCausalLM", {}),
    ("gptj", "GPTJConfig", "GPTJForCausalLM", {"rotary_dim": 8}),
    ("codegen", "CodeGenConfig", "CodeGenForCausalLM", {"rotary_dim": 8}),
    ("opt", "OPTConfig", "OPTForCausalLM", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    ("bloom", "BloomConfig", "BloomForCausalLM", {}),
    ("falcon-new", "FalconConfig", "FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon-mqa", "FalconConfig", "FalconForCausalLM", {"multi_query": True}),
    ("falcon-alibi", "FalconConfig", "FalconForCausalLM", {"multi_query": False, "alibi": True}),
    ("mpt", "MptConfig", "MptForCausalLM", {"max_seq_len": 64}),
    ("gpt_bigcode", "GPTBigCodeConfig", "GPTBigCodeForCausalLM", {}),
    ("starcoder2", "Starcoder2Config", "Starcoder2ForCausalLM", GQA),
    ("stablelm", "StableLmConfig", "StableLmForCausalLM", {"qk_layernorm": True}),
    ("olmo", "OlmoConfig", "OlmoForCausalLM", {}),
    ("olmo2", "Olmo2Config", "Olmo2ForCausalLM", {}),
    ("olmo3", "Olmo3Config", "Olmo3ForCausalLM", {"sliding_window": 4}),
    ("olmoe", "OlmoeConfig", "OlmoeForCausalLM", MOE),
    ("cohere", "CohereConfig", "CohereForCausalLM", {"use_qk_norm": True}),
    ("cohere2", "Cohere2Config", "Cohere2ForCausalLM", {"sliding_window": 4}),
    ("glm", "GlmConfig", "GlmForCausalLM", HEAD16),
    ("glm4", "Glm4Config", "Glm4ForCausalLM", HEAD16),
    ("granite", "GraniteConfig", "GraniteForCausalLM", {"attention_multiplier": 0.2}),
    ("granitemoe", "GraniteMoeConfig", "GraniteMoeForCausalLM", MOE),
    ("helium", "HeliumConfig", "HeliumForCausalLM", HEAD16),
    ("nemotron", "NemotronConfig", "NemotronForCausalLM", HEAD16),
    ("persimmon", "PersimmonConfig", "PersimmonForCausalLM", {}),
    ("xglm", "XGLMConfig", "XGLMForCausalLM", {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128}),
    ("biogpt", "BioGptConfig", "BioGptForCausalLM", {}),
    ("ctrl", "CTRLConfig", "CTRLLMHeadModel", {"dff": 128}),
    ("xlm", "XLMConfig", "XLMWithLMHeadModel", {"emb_dim": 64, "n_layers": 2, "n_heads": 4}),
    ("deepseek_v2", "DeepseekV2Config", "DeepseekV2ForCausalLM", MLA),
    ("deepseek_v3", "DeepseekV3Config", "DeepseekV3ForCausalLM", MLA),
    ("minicpm3", "MiniCPM3Config", "MiniCPM3ForCausalLM", MLA),
    ("llama4_text", "Llama4TextConfig", "Llama4ForCausalLM", {**MOE, **HEAD16, "attention_chunk_size": 4}),
    ("gpt_oss", "GptOssConfig", "GptOssForCausalLM", {**MOE, **HEAD16, "sliding_window": 4}),
    ("exaone4", "Exaone4Config", "Exaone4ForCausalLM", {"sliding_window": 4}),
    ("smollm3", "SmolLM3Config", "SmolLM3ForCausalLM", {}),
    ("arcee", "ArceeConfig", "ArceeForCausalLM", {}),
    ("apertus", "ApertusConfig", "ApertusForCausalLM", {}),
    ("diffllama", "DiffLlamaConfig", "DiffLlamaForCausalLM", {}),
    ("ernie4_5", "Ernie4_5Config", "Ernie4_5ForCausalLM", {}),
    ("hunyuan", "HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM", HEAD16),
    ("seed_oss", "SeedOssConfig", "SeedOssForCausalLM", HEAD16),
    ("nanochat", "NanoChatConfig", "NanoChatForCausalLM", {}),
    ("modernbert-decoder", "ModernBertDecoderConfig", "ModernBertDecoderForCausalLM", {"local_attention": 4}),
    ("doge", "DogeConfig", "DogeForCausalLM", {}),
    ("dots1", "Dots1Config", "Dots1ForCausalLM", DOTS),
    ("bitnet", "BitNetConfig", "BitNetForCausalLM", {}),
    ("jetmoe", "JetMoeConfig", "JetMoeForCausalLM", {**MOE, "kv_channels": 16, "num_key_value_heads": 2}),
    ("lfm2", "Lfm2Config", "Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    (
        "qwen3_next",
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {**MOE, **HEAD16, "layer_types": ["linear_attention", "full_attention"]},
    ),
    (
        "recurrent_gemma",
        "RecurrentGemmaConfig",
        "RecurrentGemmaForCausalLM",
        {"attention_window_size": 4, "num_hidden_layers": 3},
    ),
    (
        "bamba",
        "BambaConfig",
        "BambaForCausalLM",
        {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_chunk_size": 8},
    ),
    (
        "zamba",
        "ZambaConfig",
        "ZambaForCausalLM",
        {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    ),
    ("jamba", "JambaConfig", "JambaForCausalLM", {**MOE, "attn_layer_period": 2, "attn_layer_offset": 1}),
    ("bert-generation", "BertGenerationConfig", "BertGenerationDecoder", {"is_decoder": True}),
    ("bert-causal", "BertConfig", "BertLMHeadModel", {"is_decoder": True}),
    ("roberta-causal", "RobertaConfig", "RobertaForCausalLM", {"is_decoder": True}),
    ("trocr", "TrOCRConfig", "TrOCRForCausalLM", {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4}),
    ("youtu", "YoutuConfig", "YoutuForCausalLM", MLA),
    ("longcat", "LongcatFlashConfig", "LongcatFlashForCausalLM", MLA),
    ("vaultgemma", "VaultGemmaConfig", "VaultGemmaForCausalLM", {**HEAD16, "sliding_window": 4}),
    ("flex_olmo", "FlexOlmoConfig", "FlexOlmoForCausalLM", MOE),
    ("minimax_m2", "MiniMaxM2Config", "MiniMaxM2ForCausalLM", {**MOE, **HEAD16}),
    ("mamba", "MambaConfig", "MambaForCausalLM", {}),
]

EAGER = (
    "gemma2", "openai-gpt", "gpt_neo", "gpt_neox_japanese", "gptj", "codegen", "bloom", "mpt", "xglm", "xlm", "gpt_oss",
    "trocr", "vaultgemma", "mamba",
)  # fmt: skip
"""Types that have no sdpa."""

ONLY = dict.fromkeys(EAGER, "eager")

XLNET: dict[str, Any] = {"vocab_size": 128, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128}

DECODERS = [
    *entries("decoder", TEXT, ROWS, ONLY),
    *entries("decoder", XLNET, [("xlnet", "XLNetConfig", "XLNetLMHeadModel", {})], {"xlnet": "eager"}),
]
