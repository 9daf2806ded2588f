#!/usr/bin/env python3
"""Make the golden files of this folder with Hugging Face transformers and tokenizers. README.md says how and what.

    make_goldens.py models                    micro models of random weights and their numbers
    make_goldens.py texts DIR NAME            numbers of a given model folder on our texts
    make_goldens.py tokenizers                two small tokenizers and their goldens
    make_goldens.py tokenizer DIR NAME        goldens of a given tokenizer.json
    make_goldens.py chat                      chat templates rendered and tokenised
"""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    modes.add_parser("models").add_argument("--threads", type=int, default=1)
    texts = modes.add_parser("texts")
    texts.add_argument("--threads", type=int, default=2)
    modes.add_parser("tokenizers")
    modes.add_parser("chat")
    for given in (texts, modes.add_parser("tokenizer")):
        given.add_argument("dir", type=Path)
        given.add_argument("name")
    args = parser.parse_args()

    # Imported late: the text modes run where torch is not installed.
    match args.mode:
        case "models":
            from golden_models import make_models

            make_models(args.threads)
        case "texts":
            from golden_models import make_texts

            make_texts(args.dir, args.name, args.threads)
        case "tokenizers":
            from golden_text import make_tokenizers

            make_tokenizers()
        case "tokenizer":
            from golden_text import make_tokenizer_golden

            make_tokenizer_golden(args.dir, args.name, f"tokenizer DIR {args.name}")
        case "chat":
            from golden_text import make_chat

            make_chat()


if __name__ == "__main__":
    main()
