"""Text: encoders, decoders, encoder-decoders, state spaces."""

from __future__ import annotations

from typing import Any

from sweep.entry import Entry, integers
from sweep.hub import VOCABULARY, hub, named, tokens

WIDTH = 32
#: BERT's names
BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
}
#: Llama's names; two key heads for four query heads
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALL_HEADS = {**LLAMA, "num_key_value_heads": 4}
#: all experts as one batched product, in any precision
EXPERTS = {"_experts_implementation": "batched_mm"}
#: encoder-decoders with Bart's names
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 40,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "use_cache": False,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}


def _pair(batch: int, generator: Any) -> Any:
    return integers(generator, VOCABULARY, batch, 10, low=4)


PAIR = named(input_ids=_pair, decoder_input_ids=lambda b, g: integers(g, VOCABULARY, b, 7, low=4))


def without(config: dict[str, Any], *names: str, **more: Any) -> dict[str, Any]:
    """A configuration without some names, with others."""
    return {k: v for k, v in config.items() if k not in names} | more


def entries() -> list[Entry]:
    """All of them."""
    return [*encoders(), *decoders(), *encoder_decoders(), *recurrences()]


def encoders() -> list[Entry]:
    """Bidirectional."""
    kind = "encoder"
    return [
        hub("bert", kind, "BertModel", BERT, tokens()),
        hub("bert-classifier", kind, "BertForSequenceClassification", BERT, tokens()),
        hub("bert-masked", kind, "BertForMaskedLM", BERT, tokens()),
        hub("roberta", kind, "RobertaModel", BERT, tokens()),
        hub("xlm-roberta", kind, "XLMRobertaForTokenClassification", BERT, tokens()),
        hub("camembert", kind, "CamembertModel", BERT, tokens()),
        hub("electra", kind, "ElectraForPreTraining", {**BERT, "embedding_size": 16}, tokens()),
        hub("albert", kind, "AlbertModel", {**BERT, "embedding_size": 16, "num_hidden_groups": 1}, tokens()),
        hub("deberta", kind, "DebertaModel", {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, tokens()),
        hub("deberta-v2", kind, "DebertaV2Model", {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, tokens()),
        hub("mpnet", kind, "MPNetModel", BERT, tokens()),
        hub(
            "distilbert",
            kind,
            "DistilBertForSequenceClassification",
            {"vocab_size": VOCABULARY, "dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40},
            tokens(),
        ),
        hub("convbert", kind, "ConvBertModel", {**BERT, "embedding_size": 16, "head_ratio": 2, "conv_kernel_size": 3}, tokens()),
        hub("squeezebert", kind, "SqueezeBertModel", {**BERT, "embedding_size": WIDTH}, tokens()),
        hub(
            "mobilebert",
            kind,
            "MobileBertModel",
            {**BERT, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16, "num_feedforward_networks": 2},
            tokens(),
        ),
        hub(
            "modernbert",
            kind,
            "ModernBertModel",
            without(
                BERT, "type_vocab_size", pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, local_attention=8
            ),
            tokens(),
        ),
        hub("roformer", kind, "RoFormerModel", {**BERT, "embedding_size": WIDTH}, tokens()),
        hub("nystromformer", kind, "NystromformerModel", {**BERT, "num_landmarks": 12, "segment_means_seq_len": 12}, tokens(mask=False)),
        hub("fnet", kind, "FNetModel", without(BERT, "num_attention_heads"), tokens(mask=False)),
        hub(
            "funnel",
            kind,
            "FunnelBaseModel",
            {
                "vocab_size": VOCABULARY,
                "block_sizes": [1, 1],
                "num_decoder_layers": 1,
                "d_model": WIDTH,
                "n_head": 4,
                "d_head": 8,
                "d_inner": 48,
            },
            tokens(),
        ),
        hub("ibert", kind, "IBertModel", BERT, tokens()),
        hub("esm", kind, "EsmModel", {**BERT, "pad_token_id": 1, "mask_token_id": 3, "position_embedding_type": "rotary"}, tokens()),
        hub("ernie", kind, "ErnieModel", BERT, tokens()),
        hub("splinter", kind, "SplinterModel", BERT, tokens()),
        hub("rembert", kind, "RemBertModel", {**BERT, "input_embedding_size": 16, "output_embedding_size": 16}, tokens()),
        hub("megatron-bert", kind, "MegatronBertModel", BERT, tokens()),
        hub(
            "xlnet",
            kind,
            "XLNetModel",
            {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layer": 2, "n_head": 4, "d_inner": 48, "use_mems_eval": False},
            tokens(),
        ),
        hub(
            "layoutlm",
            kind,
            "LayoutLMModel",
            {**BERT, "max_2d_position_embeddings": 64},
            named(
                input_ids=lambda b, g: integers(g, VOCABULARY, b, 12, low=4), bbox=lambda b, g: integers(g, 32, b, 12, 4).sort(-1).values
            ),
        ),
    ]


def decoders() -> list[Entry]:
    """Causal, with and without shared key heads."""
    kind = "decoder"
    gpt2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 40, "use_cache": False}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    return [
        hub("llama", kind, "LlamaForCausalLM", LLAMA, tokens()),
        hub("mistral", kind, "MistralForCausalLM", {**LLAMA, "sliding_window": 8}, tokens()),
        hub("qwen2", kind, "Qwen2ForCausalLM", LLAMA, tokens()),
        hub("qwen3", kind, "Qwen3ForCausalLM", {**LLAMA, "head_dim": 8}, tokens()),
        hub("gemma", kind, "GemmaForCausalLM", {**LLAMA, "head_dim": 8}, tokens()),
        hub("gemma2", kind, "Gemma2ForCausalLM", {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}, tokens()),
        hub("gemma3", kind, "Gemma3ForCausalLM", {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}, tokens()),
        hub("phi", kind, "PhiForCausalLM", {**ALL_HEADS, "partial_rotary_factor": 0.5}, tokens()),
        hub("phi3", kind, "Phi3ForCausalLM", LLAMA, tokens()),
        hub("granite", kind, "GraniteForCausalLM", LLAMA, tokens()),
        hub("cohere", kind, "CohereForCausalLM", LLAMA, tokens()),
        hub("glm", kind, "GlmForCausalLM", {**LLAMA, "head_dim": 8}, tokens()),
        hub("olmo", kind, "OlmoForCausalLM", LLAMA, tokens()),
        hub("olmo2", kind, "Olmo2ForCausalLM", LLAMA, tokens()),
        hub("stablelm", kind, "StableLmForCausalLM", {**LLAMA, "partial_rotary_factor": 0.5}, tokens()),
        hub("starcoder2", kind, "Starcoder2ForCausalLM", LLAMA, tokens()),
        hub("smollm3", kind, "SmolLM3ForCausalLM", LLAMA, tokens()),
        hub("persimmon", kind, "PersimmonForCausalLM", without(LLAMA, "num_key_value_heads"), tokens()),
        hub("nemotron", kind, "NemotronForCausalLM", LLAMA, tokens()),
        hub(
            "falcon",
            kind,
            "FalconForCausalLM",
            {
                "vocab_size": VOCABULARY,
                "hidden_size": WIDTH,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "multi_query": True,
                "use_cache": False,
                **special,
            },
            tokens(),
        ),
        hub("gpt2", kind, "GPT2LMHeadModel", {**gpt2, **special}, tokens()),
        hub("gpt-bigcode", kind, "GPTBigCodeForCausalLM", {**gpt2, **special, "multi_query": True}, tokens()),
        hub(
            "gpt-neo",
            kind,
            "GPTNeoForCausalLM",
            {
                "vocab_size": VOCABULARY,
                "hidden_size": WIDTH,
                "num_layers": 2,
                "num_heads": 4,
                "attention_types": [[["global", "local"], 1]],
                "max_position_embeddings": 40,
                "window_size": 8,
                "use_cache": False,
                **special,
            },
            tokens(),
        ),
        hub("gpt-neox", kind, "GPTNeoXForCausalLM", {**without(LLAMA, "num_key_value_heads", "pad_token_id")}, tokens()),
        hub("gptj", kind, "GPTJForCausalLM", {**gpt2, **special, "rotary_dim": 4}, tokens()),
        hub("codegen", kind, "CodeGenForCausalLM", {**gpt2, **special, "rotary_dim": 4}, tokens()),
        hub(
            "opt",
            kind,
            "OPTForCausalLM",
            {
                "vocab_size": VOCABULARY,
                "hidden_size": WIDTH,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "ffn_dim": 48,
                "max_position_embeddings": 40,
                "word_embed_proj_dim": WIDTH,
                "use_cache": False,
            },
            tokens(),
        ),
        hub(
            "bloom",
            kind,
            "BloomForCausalLM",
            {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4, "use_cache": False},
            tokens(),
        ),
        hub(
            "mpt",
            kind,
            "MptForCausalLM",
            {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layers": 2, "n_heads": 4, "max_seq_len": 40, "use_cache": False},
            tokens(),
        ),
        hub("biogpt", kind, "BioGptForCausalLM", {**without(BERT, "type_vocab_size"), "use_cache": False}, tokens()),
        hub("mixtral", kind, "MixtralForCausalLM", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}, tokens(), EXPERTS),
        hub(
            "qwen2-moe",
            kind,
            "Qwen2MoeForCausalLM",
            {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
            tokens(),
            EXPERTS,
        ),
        hub(
            "deepseek-v3",
            kind,
            "DeepseekV3ForCausalLM",
            {
                **ALL_HEADS,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "moe_intermediate_size": 24,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_rope_head_dim": 4,
                "qk_nope_head_dim": 8,
                "v_head_dim": 8,
                "first_k_dense_replace": 1,
                "n_shared_experts": 1,
            },
            tokens(),
            EXPERTS,
        ),
    ]


def encoder_decoders() -> list[Entry]:
    """Two towers with cross attention."""
    kind = "encoder-decoder"
    return [
        hub("t5", kind, "T5ForConditionalGeneration", T5, PAIR),
        hub("mt5", kind, "MT5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}, PAIR),
        hub("bart", kind, "BartForConditionalGeneration", BART, PAIR),
        hub("mbart", kind, "MBartForConditionalGeneration", BART, PAIR),
        hub("pegasus", kind, "PegasusForConditionalGeneration", BART, PAIR),
        hub("m2m100", kind, "M2M100ForConditionalGeneration", BART, PAIR),
        hub("marian", kind, "MarianMTModel", BART, PAIR),
        hub("blenderbot-small", kind, "BlenderbotSmallForConditionalGeneration", BART, PAIR),
        hub("prophetnet", kind, "ProphetNetForConditionalGeneration", _prophet(), PAIR),
    ]


def _prophet() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "encoder_ffn_dim": 48,
        "num_encoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "num_decoder_layers": 2,
        "num_decoder_attention_heads": 4,
        "max_position_embeddings": 40,
        "use_cache": False,
        "ngram": 2,
    }


def recurrences() -> list[Entry]:
    """State spaces and linear recurrences."""
    kind = "state space"
    mamba = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 4, "use_cache": False}
    return [
        hub("mamba", kind, "MambaForCausalLM", {**mamba, "time_step_rank": 4}, tokens(8, mask=False)),
        hub("falcon-mamba", kind, "FalconMambaForCausalLM", {**mamba, "time_step_rank": 4}, tokens(8, mask=False)),
        hub(
            "mamba2",
            kind,
            "Mamba2ForCausalLM",
            {**mamba, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
            tokens(8, mask=False),
        ),
        hub(
            "rwkv",
            kind,
            "RwkvForCausalLM",
            {
                "vocab_size": VOCABULARY,
                "hidden_size": WIDTH,
                "num_hidden_layers": 2,
                "context_length": 16,
                "rescale_every": 0,
                "use_cache": False,
            },
            tokens(8, mask=False),
        ),
        hub("recurrent-gemma", kind, "RecurrentGemmaForCausalLM", {**LLAMA, "lru_width": WIDTH, "attention_window_size": 8}, tokens(8)),
        hub(
            "bamba",
            kind,
            "BambaForCausalLM",
            {
                **LLAMA,
                "mamba_n_heads": 8,
                "mamba_d_head": 8,
                "mamba_n_groups": 1,
                "mamba_d_state": 4,
                "mamba_chunk_size": 4,
                "attn_layer_indices": [1],
            },
            tokens(8),
        ),
    ]
