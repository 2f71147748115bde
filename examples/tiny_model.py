"""Write a tiny random model of a transformers architecture, with a byte tokenizer: a dry run of a recipe without its model, its data or a GPU.

    python examples/tiny_model.py qwen2 tiny/qwen2
    hetlora compare --config examples/gpu-qwen2.5-dolly.yaml --model tiny/qwen2 --data my-rows.jsonl --device cpu --rounds 1 ...

The width is 64, so that ranks up to 64 fit.
"""

from __future__ import annotations

import sys
from pathlib import Path


def write_tiny_model(architecture: str, folder: str | Path) -> Path:
    """`architecture`: the model_type in the real model's config.json, such as 'llama' (SmolLM2) or 'qwen2'. Nothing is downloaded."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    # byte-level, in the form of these models' own tokenizers: transformers loads the class that belongs to the architecture
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "</s>", *letters])}, []))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="</s>", pad_token="<pad>")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(architecture, vocab_size=len(tokenizer), tie_word_embeddings=True, max_position_embeddings=1024, **sizes, **ends)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/tiny_model.py ARCHITECTURE FOLDER")
    print(write_tiny_model(sys.argv[1], sys.argv[2]))
