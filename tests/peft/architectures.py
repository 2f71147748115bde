"""Tiny models of many transformers architectures with random weights, and an input of theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCAB, PICTURE = 61, 60
DECODER = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
DECODER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = DECODER | {"num_key_value_heads": 2}
GPT = {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {key: value for key, value in DECODER.items() if key not in ("bos_token_id", "eos_token_id")}
ENCODER |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 80}
T5 = {"vocab_size": VOCAB, "d_model": 24, "d_ff": 40, "d_kv": 6, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0}
BART = {"vocab_size": VOCAB, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
BART |= {"encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_position_embeddings": 64, "dropout": 0.0, "pad_token_id": 0, "decoder_start_token_id": 2}
PICTURES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8, "num_channels": 3}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = DECODER | {"num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
SWITCH = T5 | {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "router_jitter_noise": 0.0, "pad_token_id": 0}
NEO = {"vocab_size": VOCAB, "hidden_size": 24, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
DISTILBERT = {"vocab_size": VOCAB, "dim": 24, "hidden_dim": 40, "n_layers": 2, "n_heads": 4, "dropout": 0.0, "attention_dropout": 0.0}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}


@dataclass(frozen=True)
class Architecture:
    make: Callable[[], nn.Module]
    kind: str = "text"
    dtype: torch.dtype = torch.float64
    leave: tuple[str, ...] = ()  # last names of layers that cannot carry adapters


def _of(model: str, config: str, kind: str = "text", dtype=torch.float64, leave=(), **options: Any) -> Architecture:
    return Architecture(lambda: getattr(tf, model)(getattr(tf, config)(**options)), kind, dtype, leave)


MOE = torch.float32  # their grouped product takes no float64
INSIDE = torch.float32  # its attention is float32 whatever the model is, and the order of its sums the library's, by the size of the batch
ARCHITECTURES = {
    "llama": _of("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "qwen2": _of("Qwen2ForCausalLM", "Qwen2Config", **GROUPED),
    "mistral": _of("MistralForCausalLM", "MistralConfig", **GROUPED),
    "gemma": _of("GemmaForCausalLM", "GemmaConfig", **GROUPED, head_dim=6),
    "gemma2": _of("Gemma2ForCausalLM", "Gemma2Config", **GROUPED, head_dim=6),
    "phi": _of("PhiForCausalLM", "PhiConfig", **(DECODER | {"hidden_size": 32})),
    "phi3": _of("Phi3ForCausalLM", "Phi3Config", **GROUPED),
    "gpt2": _of("GPT2LMHeadModel", "GPT2Config", **GPT),
    "gpt_neo": _of("GPTNeoForCausalLM", "GPTNeoConfig", dtype=INSIDE, **NEO),
    "gpt_neox": _of("GPTNeoXForCausalLM", "GPTNeoXConfig", **DECODER),
    "opt": _of("OPTForCausalLM", "OPTConfig", **(DECODER | {"ffn_dim": 40, "word_embed_proj_dim": 24, "dropout": 0.0})),
    "bloom": _of("BloomForCausalLM", "BloomConfig", vocab_size=VOCAB, hidden_size=24, n_layer=2, n_head=4),
    "falcon": _of("FalconForCausalLM", "FalconConfig", vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=4),
    "mpt": _of("MptForCausalLM", "MptConfig", vocab_size=VOCAB, d_model=24, n_layers=2, n_heads=4, max_seq_len=64),
    "mixtral": _of("MixtralForCausalLM", "MixtralConfig", dtype=MOE, **GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": _of("Qwen2MoeForCausalLM", "Qwen2MoeConfig", dtype=MOE, **GROUPED, **EXPERTS, moe_intermediate_size=16, shared_expert_intermediate_size=20),
    "deepseek_v3": _of("DeepseekV3ForCausalLM", "DeepseekV3Config", dtype=MOE, **DEEPSEEK, n_shared_experts=1),
    "jamba": _of(
        "JambaForCausalLM", "JambaConfig", dtype=MOE, leave=("dt_proj", "out_proj"), **GROUPED, num_experts=2, num_experts_per_tok=1, use_mamba_kernels=False,
        attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1, expert_layer_period=2,
    ),
    "llama classifier": _of("LlamaForSequenceClassification", "LlamaConfig", **GROUPED),
    "gpt2 classifier": _of("GPT2ForSequenceClassification", "GPT2Config", **GPT),
    "bert": _of("BertForMaskedLM", "BertConfig", **ENCODER),
    "bert classifier": _of("BertForSequenceClassification", "BertConfig", **ENCODER),
    "roberta classifier": _of("RobertaForSequenceClassification", "RobertaConfig", **ENCODER),
    "distilbert classifier": _of("DistilBertForSequenceClassification", "DistilBertConfig", **DISTILBERT),
    "albert classifier": _of("AlbertForSequenceClassification", "AlbertConfig", **ENCODER, embedding_size=12),
    "longformer": _of("LongformerForMaskedLM", "LongformerConfig", **ENCODER, attention_window=4),
    "fnet": _of("FNetForMaskedLM", "FNetConfig", vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2, hidden_dropout_prob=0.0),
    "xlnet": _of("XLNetLMHeadModel", "XLNetConfig", vocab_size=VOCAB, d_model=24, n_layer=2, n_head=4, d_inner=40, dropout=0.0),  # sequence-first inside
    "t5": _of("T5ForConditionalGeneration", "T5Config", "pair", **T5, pad_token_id=0),
    "switch": _of("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", "pair", MOE, **SWITCH),  # experts of their own linear layers
    "bart": _of("BartForConditionalGeneration", "BartConfig", "pair", **BART),
    "bart classifier": _of("BartForSequenceClassification", "BartConfig", "ends", **BART),
    "marian": _of("MarianMTModel", "MarianConfig", "pair", **BART),
    "vit": _of("ViTForImageClassification", "ViTConfig", "picture", **PICTURES),
    "dinov2": _of("Dinov2ForImageClassification", "Dinov2Config", "picture", **PICTURES),
    "swin": _of("SwinForImageClassification", "SwinConfig", "picture", **SWIN),
    "clip": Architecture(
        lambda: tf.CLIPModel(tf.CLIPConfig(text_config=DECODER, vision_config=PICTURES, projection_dim=16)), "both"
    ),
    "llava": Architecture(
        lambda: tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(vision_config=tf.CLIPVisionConfig(**PICTURES), text_config=tf.LlamaConfig(**GROUPED), image_token_index=PICTURE)
        ),
        "picture in text",
    ),
    "whisper": _of("WhisperForConditionalGeneration", "WhisperConfig", "sound", **BART, num_mel_bins=8, max_source_positions=10, max_target_positions=30),
}  # fmt: skip


def tiny(name: str) -> nn.Module:
    """With weights large enough that a change of one layer is seen in the output."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = architecture.make().to(architecture.dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
    return model


def adapted_shapes(name: str, model: nn.Module) -> dict[str, tuple[int, int]]:
    """Every linear layer but the output head and those that cannot carry adapters."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {}
    for layer, module in model.named_modules():
        if module is head or layer.rpartition(".")[2] in ARCHITECTURES[name].leave:
            continue
        if isinstance(module, nn.Linear):
            found[layer] = (module.out_features, module.in_features)
        elif type(module).__name__ == "Conv1D":
            found[layer] = (module.nf, module.weight.shape[0])
    return found


def batch_of(name: str, sequences: int, length: int) -> dict[str, Tensor]:
    kind, dtype = ARCHITECTURES[name].kind, ARCHITECTURES[name].dtype
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 58, (sequences, length), generator=g)
    pictures = torch.randn(sequences, 3, 16, 16, generator=g).to(dtype)
    if kind in ("ends", "both"):
        tokens[:, -1] = 2
    if kind == "picture in text":
        tokens[:, 1:5] = PICTURE
    return {
        "text": {"input_ids": tokens},
        "ends": {"input_ids": tokens},
        "pair": {"input_ids": tokens, "decoder_input_ids": tokens[:, :4].flip(1)},
        "picture": {"pixel_values": pictures},
        "both": {"input_ids": tokens, "pixel_values": pictures},
        "picture in text": {"input_ids": tokens, "pixel_values": pictures},
        "sound": {"input_features": torch.randn(sequences, 8, 20, generator=g).to(dtype), "decoder_input_ids": tokens},
    }[kind]


def output_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """[sequences, ...]"""
    out = model(**inputs)
    return torch.cat([out.text_embeds, out.image_embeds], -1) if hasattr(out, "text_embeds") else out.logits
