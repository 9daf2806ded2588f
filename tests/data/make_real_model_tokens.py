#!/usr/bin/env python3
"""Writes real_model_tokens.json: what llama.cpp's own tokeniser makes of 20 strings, with the real model's GGUF file.

    pip install llama-cpp-python==0.3.36
    make_real_model_tokens.py target/real-model-package/*/*.gguf > tests/data/real_model_tokens.json

Run once, by hand: our tokenizer.json is made by us, so that only another implementation can say that it is right.
"parse_special" tells whether the text of a control token counts as that token or as plain text.
"""
import json
import sys

import llama_cpp

CASES = [
    ("I have a dream of a house by the sea.", True),
    ("It's 1984, isn't it? We'll see: they've said 3.14159 and 1,000,000.", True),
    ("0123456789 42nd ½ ² ٣٤ Ⅷ", True),
    ("The naïve façade of the café cost €12.50 (£10), not ¥1500!", True),
    ("👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🌶️k", True),
    ("Pijamalı hasta yağız şoföre çabucak güvendi. İSTANBUL ığüşöç", True),
    ("敏捷的棕色狐狸跳过了懒狗。東京は夜の七時、서울은 아침입니다.", True),
    ("Съешь же ещё этих мягких французских булок, да выпей чаю", True),
    ("مرحبا بالعالم שלום עולם नमस्ते दुनिया", True),
    ("def f(x: int) -> int:\n    if x < 2:\n        return x\n    return f(x - 1) + f(x - 2)\n", True),
    ('fn main() {\n\tlet v = vec![0u8; 16];\n\tprintln!("{:?}", v);\n}', True),
    ("   three before,    four between, two after  ", True),
    ("\n\n\n\t\t \n  \r\n end \u00a0 \u2003 x", True),
    ("<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n", True),
    ("<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n", False),
    ("a<|endoftext|>b <|endoftext|> c<repo_name><file_sep>x", True),
    ("a<|endoftext|>b <|endoftext|> c<repo_name><file_sep>x", False),
    ("e\u0301 n\u0303 Z\u0351\u036b\u0343 combining \u200b zero \ufeff width", True),
    ("https://example.org/a?b=c&d=%20e#f user@example.org ../x_y-z.tar.gz", True),
    ("antidisestablishmentarianism!!!???...---***###@@@~~~ \\o/ ^_^ x=y==z!=w", True),
]


def main() -> None:
    """Tokenises every case with the vocabulary of the GGUF file named on the command line."""
    llama = llama_cpp.Llama(model_path=sys.argv[1], vocab_only=True, verbose=False)
    cases = []
    for text, special in CASES:
        ids = llama.tokenize(text.encode(), add_bos=False, special=special)
        cases.append({"text": text, "parse_special": special, "ids": ids})
    made_by = f"tests/data/make_real_model_tokens.py, llama-cpp-python {llama_cpp.__version__}"
    rows = ",\n".join("  " + json.dumps(case, ensure_ascii=False) for case in cases)
    print(f'{{"made_by": {json.dumps(made_by)}, "cases": [\n{rows}\n]}}')


if __name__ == "__main__":
    main()
