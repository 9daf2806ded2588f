"""Two small tokenizers of our own, and goldens of tokenisers and chat templates, by Hugging Face's tokenizers and
transformers."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import jinja2
import numpy as np
import tokenizers
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from golden_cases import CHATS, SNIPPETS, STRINGS
from golden_common import GOLDEN, provenance, read_texts, sha256_of, write_golden

TEMPLATES = GOLDEN / "templates"
TOKENIZERS = GOLDEN / "tokenizers"
ID_LISTS = 32
ID_LISTS_SEED = 7


# ---- our own tokenizers ----


def byte_level() -> Tokenizer:
    """GPT-2's split, byte-level BPE; no BOS of its own; control tokens of two chat formats first, added ones last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>"]
    control += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=control, show_progress=False
    )
    tokenizer.train_from_iterator([text for _, text in read_texts()], trainer)
    # Added after training, as real ones have them: words that are not special, and a token that eats spaces before it.
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<tool_call>", "</tool_call>", "<think>")])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False, special=True)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """SentencePiece's kind as Llama 2 has it: ▁ for a space and before the text, all 256 bytes, <s> in front."""
    lines = [line for _, text in read_texts() for line in text.split("\n") if line]
    # The alphabet is chosen here because the trainer's own choice among equally frequent letters changes by run; few
    # enough that many letters of every script fall back to bytes.
    counts = Counter(c for line in lines for c in line.replace(" ", "▁"))
    alphabet = [c for c, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))][:110]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=340, initial_alphabet=alphabet, limit_alphabet=len(alphabet), show_progress=False
        ),
    )
    learned = json.loads(learner.to_str())["model"]
    first = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    words = sorted(learned["vocab"], key=learned["vocab"].get)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(first + words)},
            merges=[tuple(pair) for pair in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in first[:3]])
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in ("<|im_start|>", "<|im_end|>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


# name: (maker, tokenizer_config.json, template, whether it stands inline or as chat_template.jinja)
OURS = {
    "bytelevel": (byte_level, {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}, "chatml", True),
    "bytefallback": (byte_fallback, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, "chatml", False),
}


def make_tokenizers() -> None:
    """Mode `tokenizers`: the folders under tokenizers/, and tokenizer-<name>.json for each."""
    for name, (maker, config, template, inline) in OURS.items():
        folder = TOKENIZERS / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        maker().save(str(folder / "tokenizer.json"), pretty=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | config
        if inline:
            config["chat_template"] = read_template(template)
        else:
            shutil.copyfile(TEMPLATES / f"{template}.jinja", folder / "chat_template.jinja")
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8", newline="\n")
        make_tokenizer_golden(folder, name, "tokenizers")


# ---- goldens of a tokenizer ----


def encode(tokenizer: Tokenizer, text: str, added: bool, control_as_text: bool = False) -> list[int]:
    tokenizer.encode_special_tokens = control_as_text
    ids = tokenizer.encode(text, add_special_tokens=added).ids
    tokenizer.encode_special_tokens = False
    return ids


def decodings(tokenizer: Tokenizer, ids: list[int]) -> dict:
    return {
        "decoded": tokenizer.decode(ids, skip_special_tokens=False),
        "decoded_without_special": tokenizer.decode(ids, skip_special_tokens=True),
    }


def make_tokenizer_golden(folder: Path, name: str, mode: str) -> None:
    """Mode `tokenizer`: tokenizer-<name>.json of a given folder."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    strings = []
    for text in STRINGS + [text for _, text in read_texts()[:-1]]:
        with_added = encode(tokenizer, text, added=True)
        golden = {"text": text, "ids": encode(tokenizer, text, added=False), "ids_with_added": with_added}
        golden["ids_control_as_text"] = encode(tokenizer, text, added=False, control_as_text=True)
        strings.append(golden | decodings(tokenizer, with_added))
    known = np.array(sorted(tokenizer.get_vocab(with_added_tokens=True).values()))
    rng = np.random.RandomState(ID_LISTS_SEED)
    # Half of the lists draw from the lowest 300 ids, where bytes and control tokens stand in most vocabularies.
    pools = [known, known[:300]]
    id_lists = [rng.choice(pools[i % 2], rng.randint(1, 25)).tolist() for i in range(ID_LISTS)]
    value = {
        "provenance": provenance(mode, [tokenizers, np], seed=ID_LISTS_SEED),
        "tokenizer": name,
        "sha256": sha256_of(folder, ["tokenizer.json"]),
        "vocab_size": tokenizer.get_vocab_size(with_added_tokens=True),
        "strings": strings,
        "id_lists": [{"ids": ids} | decodings(tokenizer, ids) for ids in id_lists],
    }
    write_golden(GOLDEN / f"tokenizer-{name}.json", value)


# ---- goldens of chat templates ----


def read_template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def load_transformers_tokenizer(name: str) -> PreTrainedTokenizerFast:
    config = {k: v for k, v in OURS[name][1].items()}
    return PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZERS / name / "tokenizer.json"), **config)


MARK = "\ue000"  # private use: no text of ours has it


def mark_control(value, control: re.Pattern):
    """Put MARK inside every control token that a client's strings hold, so that it no longer reads as one."""
    if isinstance(value, str):
        return control.sub(lambda found: found[0][0] + MARK + found[0][1:], value)
    if isinstance(value, list):
        return [mark_control(v, control) for v in value]
    if isinstance(value, dict):
        return {k: mark_control(v, control) for k, v in value.items()}
    return value


def encode_chat(tokenizer: Tokenizer, marked: str, control: re.Pattern) -> list[int]:
    """Ids of a rendered chat in which only the template's own control tokens act: the text between two of them is
    encoded whole, whatever it holds."""
    ids = []
    for piece in re.split(f"({control.pattern})", marked):
        if control.fullmatch(piece):
            ids.append(tokenizer.token_to_id(piece))
        elif piece:
            ids += encode(tokenizer, piece.replace(MARK, ""), added=False, control_as_text=True)
    return ids


def chat_golden(case: dict, loaded: dict[str, PreTrainedTokenizerFast]) -> dict:
    hf = loaded[case["tokenizer"]]
    plain = Tokenizer.from_file(str(TOKENIZERS / case["tokenizer"] / "tokenizer.json"))
    template = read_template(case["template"])
    options = {"chat_template": template, "add_generation_prompt": case["add_generation_prompt"]} | case["variables"]

    def render(messages, tools) -> str:
        return hf.apply_chat_template(messages, tools=tools, tokenize=False, **options)

    messages, tools = case["messages"], case["tools"]
    try:
        text = render(messages, tools)
    except jinja2.TemplateError as error:
        return case | {"error": raised(error)}
    special = [t.content for t in plain.get_added_tokens_decoder().values() if t.special]
    control = re.compile("|".join(re.escape(t) for t in sorted(special, key=len, reverse=True)))
    marked_messages = mark_control(messages, control)
    marked = render(marked_messages, mark_control(tools, control))
    ids = hf.apply_chat_template(messages, tools=tools, return_dict=False, **options)
    content_plain = encode_chat(plain, marked, control)
    if marked_messages == messages and ids != content_plain:
        raise SystemExit(f"two ways to encode {case['name']} differ where no content holds a control token")
    return case | {"text": text, "ids": content_plain, "ids_if_content_acted": ids}


def raised(error: jinja2.TemplateError) -> str:
    """The message that a template raised itself; a template that does not compile is our mistake."""
    if type(error) is not jinja2.TemplateError:
        raise error
    return str(error)


def make_chat() -> None:
    """Mode `chat`: chat.json, from templates/ and the tokenizers of mode `tokenizers`."""
    loaded = {name: load_transformers_tokenizer(name) for name in OURS}
    snippets = []
    for template, variables in SNIPPETS:
        case = {"template": template, "variables": variables}
        try:
            text = loaded["bytelevel"].apply_chat_template(
                [{"role": "user", "content": " Hi "}], chat_template=template, tokenize=False, **variables
            )
            snippets.append(case | {"text": text})
        except jinja2.TemplateError as error:
            snippets.append(case | {"error": raised(error)})
    value = {
        "provenance": provenance("chat", [transformers, tokenizers, jinja2]),
        "chats": [chat_golden(case, loaded) for case in CHATS],
        "snippets": snippets,
    }
    write_golden(GOLDEN / "chat.json", value)
