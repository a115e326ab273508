"""Write a genuine CLIP tokenizer whose vocabulary knows every word of the world as one token."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from tdpo_cli.sandbox.world import vocabulary

CONTEXT = 16  # tokens; the longest caption has 14 with its two ends
START, END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(folder: Path, pad: str | None = None) -> CLIPTokenizer:
    """vocab.json and merges.txt by hand: transformers 5 would write only tokenizer.json, which older readers miss."""
    pad = pad or END  # as CLIP-L does; CLIP-G pads with "!"
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(ByteLevel.alphabet())
    merges = learn_merges(vocabulary())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges), START, END]
    files = {
        "vocab.json": {token: index for index, token in enumerate(tokens)},
        "special_tokens_map.json": {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad},
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": CONTEXT,
            "do_lower_case": True,
            "bos_token": START,
            "eos_token": END,
            "unk_token": END,
            "pad_token": pad,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    for word in vocabulary():
        assert len(tokenizer(word).input_ids) == 3, f"{word!r} is not one token"
    return tokenizer


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding carried on until every word is one symbol; ties go to the alphabet."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))]
    merges = []
    while pairs := Counter(pair for symbols in spelled for pair in zip(symbols, symbols[1:], strict=False)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merge(symbols, best) for symbols in spelled]
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged, i = [], 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            merged.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return merged
