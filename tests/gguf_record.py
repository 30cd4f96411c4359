"""What transformers reads from GGUF files, for tests/test_gguf.py.

    python -m tests.gguf_record SMOLLM2.gguf

writes tests/gguf_facts.json. It needs transformers 5.24, torch, accelerate and gguf, and not this package.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import gguf_files

FACTS = Path(__file__).with_name("gguf_facts.json")
TEXTS = (
    "Hello, world!",
    " Hello  world",
    "",
    "   ",
    "a\n\n\nb\t\tc \n d",
    "def f(x):\n    return x ** 2  # 12345 + 6.7e-8\n",
    "if (a <= b && c != d) {\r\n\treturn &p->x;\r\n}",
    "The year 2024, page 1234567890, ½ and Ⅷ, x², ٣٤٥.",
    "1  2   3    4     56",
    "It's we're I'M they'LL don’t 'quoted'",
    "naïve café — résumé… “quotes”",
    "cafe\u0301 e\u0301",
    "Привет, мир! Как дела?",
    "中文分词測試,日本語のテキスト。カタカナ",
    "한국어 문장입니다. 안녕하세요!",
    "مرحبا بالعالم שלום עולם",
    "नमस्ते दुनिया ไทยภาษา",
    "👩‍👩‍👧‍👦 🚀🔥 \u200b zero\u00a0width",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    "<|user|>the world<think>hello</think><|end|> the end",
    "<s>hello the world</s> the <mark>world",
    "text<|endoftext|> more <unk>",
    "https://example.org/a_b?c=d&e=%20#frag user@host.com",
    "AAAAAAAAAAAAAAAAAAAAAAAA aaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "snake_case camelCase PascalCase SCREAMING_CASE",
    "▁▁under▁score",
    "\u0000\u0001\u007f\ufeff\ufffd",
    "a  b   c    d     e      f       g",
    "\t\t\tx\n\n\n\n\n\n\ny",
    "hello the world, hell the thing 12 123 1234",
)
#: tensors whose bytes are compared
TENSORS = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.1.self_attn.v_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "model.norm.weight",
)
#: keys of a config that transformers names as we do
KEYS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "hidden_activation", "layer_types"),
    *("sliding_window", "query_pre_attn_scalar", "rms_norm_eps"),
)


def small_files(folder: Path) -> dict[str, Path]:
    """The files with made-up weights that facts are recorded of, by name."""
    files = {
        name: gguf_files.small(folder / f"{name}.gguf", name, head=True) for name in gguf_files.ARCHITECTURES
    }
    files["sentencepiece"] = gguf_files.small(
        folder / "sentencepiece.gguf", "llama", vocabulary_of=gguf_files.sentencepiece()
    )
    for pre in ("gpt-2", "smollm", "llama-bpe", "tekken"):
        files[pre] = gguf_files.small(folder / f"{pre}.gguf", "llama", tokenizer__ggml__pre=pre)
    return files


def sha256(a: Any) -> str:
    return hashlib.sha256(a.tobytes()).hexdigest()


def facts_of(path: Path, rope: bool = True) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state = model.state_dict()
    config = model.config.to_dict()
    return {
        "ids": [tokenizer(text)["input_ids"] for text in TEXTS],
        "sha256": {name: sha256(state[name].contiguous().numpy()) for name in TENSORS},
        "config": {key: config[key] for key in KEYS if key in config},
        "rope": config["rope_parameters"],
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        facts = {name: facts_of(path) for name, path in small_files(Path(folder)).items()}
    facts["smollm2"] = facts_of(Path(sys.argv[1]))
    FACTS.write_text(json.dumps(facts, separators=(",", ":")) + "\n", "utf-8")


if __name__ == "__main__":
    main()
