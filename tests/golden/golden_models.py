"""Micro models of random weights, and teacher-forced numbers of any Llama folder, by Hugging Face transformers."""

import copy
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import tokenizers
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from golden_common import GOLDEN, provenance, read_texts, sha256_of, write_golden

PACKAGES = [torch, transformers, tokenizers, safetensors, np]
CONTEXT = 640
TOP = 20
PROBES = 16
SEGMENT = 256  # CPU.md cuts attention at multiples of it; positions around each border are always kept
ALL_POSITIONS_MAX = 224  # eleven texts with all their positions stay below 1 MB
LONG_TOKENS = 2000

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # So small that the three ranges of the rule (kept, blended, divided) all have frequencies at head_dim 16.
    "original_max_position_embeddings": 64,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass
class Micro:
    """One micro model: what its config says, and how its folder is written."""

    name: str
    seed: int
    config: dict
    dtype: torch.dtype = torch.float32
    old_spelling: bool = False
    shard_bytes_max: int = 10**9
    generation: dict = field(default_factory=lambda: {"bos_token_id": 1, "eos_token_id": 2})


def _config(vocab, hidden, intermediate, heads, kv_heads, **extra) -> dict:
    base = dict(vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=2)
    base |= dict(num_attention_heads=heads, num_key_value_heads=kv_heads, rope_parameters=dict(PLAIN_ROPE))
    return base | dict(max_position_embeddings=CONTEXT, rms_norm_eps=1e-5) | extra


LLAMA3_GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
MICRO_MODELS = [
    Micro("gqa", 101, _config(128, 64, 64, 4, 2)),
    Micro("mha-tied", 102, _config(160, 64, 64, 4, 4, tie_word_embeddings=True), old_spelling=True),
    Micro("rope-llama3", 103, _config(128, 64, 64, 4, 2, rope_parameters=dict(LLAMA3), tie_word_embeddings=True)),
    Micro("head-dim", 104, _config(131, 56, 96, 3, 1, head_dim=32, tie_word_embeddings=True)),
    Micro(
        "bf16-llama3",
        105,
        _config(160, 64, 64, 4, 2, rope_parameters=dict(LLAMA3, rope_theta=500000.0), num_hidden_layers=3),
        dtype=torch.bfloat16,
        old_spelling=True,
        generation=LLAMA3_GENERATION,
    ),
    Micro("f16", 106, _config(128, 64, 96, 4, 2), dtype=torch.float16),
    Micro("sharded", 107, _config(128, 64, 64, 4, 1), shard_bytes_max=100_000),
    Micro("biases", 108, _config(128, 64, 64, 4, 2, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    # 8 query heads and an MLP of 8 x 32, so that ranks of TP 1, 2, 4 and 8 own whole slices; KV heads repeat from 4 on.
    Micro("tp8", 109, _config(128, 64, 256, 8, 2, head_dim=16, tie_word_embeddings=True)),
]


# ---- making folders ----


def allow_any_hidden_size() -> None:
    """transformers refuses a hidden size that heads do not divide even when head_dim is given; its model needs no such
    rule, and the folder `head-dim` is about that case."""
    validators = LlamaConfig.__class_validators__
    validators[:] = [v for v in validators if v.__name__ != "validate_architecture"]


def random_weights(model: LlamaForCausalLM, rng: np.random.RandomState) -> None:
    """Fill in place. The spreads keep every part visible: scores q.k / sqrt(d) of std about 2 (attention picks), an
    embedding small enough that the norm's epsilon shows, branches that outweigh it, logits of std 1 to 2. RandomState's
    stream is frozen by numpy."""
    config = model.config
    per_input = lambda gain, inputs: gain / inputs**0.5
    spreads = {
        "embed_tokens": per_input(1.5, config.hidden_size),
        "lm_head": per_input(1.5, config.hidden_size),
        "q_proj": per_input(1.4, config.hidden_size),
        "k_proj": per_input(1.4, config.hidden_size),
        "v_proj": per_input(1.0, config.hidden_size),
        "o_proj": per_input(1.0, config.num_attention_heads * config.head_dim),
        "gate_proj": per_input(1.2, config.hidden_size),
        "up_proj": per_input(1.2, config.hidden_size),
        "down_proj": per_input(1.5, config.intermediate_size),
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)).astype(np.float32))
            part = name.split(".")[-2]
            if part.endswith("norm"):
                parameter.copy_(1.0 + 0.2 * noise)
            elif name.endswith(".bias"):
                parameter.copy_(0.4 * noise)
            else:
                parameter.copy_(spreads[part] * noise)


def write_folder(micro: Micro, folder: Path) -> None:
    """Write one model as a Hugging Face folder: transformers' own writer, then config.json respelled where asked."""
    model = LlamaForCausalLM(LlamaConfig(**micro.config))
    random_weights(model, np.random.RandomState(micro.seed))
    model.to(micro.dtype).save_pretrained(folder, max_shard_size=micro.shard_bytes_max)
    config = json.loads((folder / "config.json").read_text())
    if micro.old_spelling:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
        config["torch_dtype"] = config.pop("dtype")
        config["transformers_version"] = "4.51.3"
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", micro.generation)
    for path in folder.iterdir():
        path.chmod(0o644)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")


# ---- running transformers ----


def load(folder: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


class Norm64(nn.Module):
    def __init__(self, norm: LlamaRMSNorm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * (x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.eps))


class Rotary64(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.inv_freq = rotary_frequencies64(config)

    def forward(self, x, position_ids):
        angles = position_ids[..., None].double() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def rotary_frequencies64(config: LlamaConfig) -> torch.Tensor:
    """Rotary frequencies in float64, written from the rule (not from transformers' code): a wavelength up to
    context / high_freq_factor keeps its frequency, one from context / low_freq_factor has it divided by `factor`, and
    between them the two are blended linearly in context / wavelength."""
    rope = config.rope_parameters
    dim = config.head_dim
    freq = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if rope["rope_type"] == "default":
        return freq
    if rope["rope_type"] != "llama3":
        raise SystemExit(f"no float64 rule for rope_type {rope['rope_type']}")
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * freq / (2 * torch.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return freq * (kept + (1.0 - kept) / rope["factor"])


def in_float64(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model in float64 throughout. `.double()` alone leaves RMSNorm and the rotary tables in float32."""
    model = copy.deepcopy(model).double()
    inner = model.model
    rotary = Rotary64(model.config)
    if not torch.allclose(rotary.inv_freq.float(), inner.rotary_emb.inv_freq.float(), rtol=1e-6, atol=0.0):
        raise SystemExit("the float64 rotary frequencies differ from transformers' own")
    inner.rotary_emb = rotary
    inner.norm = Norm64(inner.norm)
    for layer in inner.layers:
        layer.input_layernorm = Norm64(layer.input_layernorm)
        layer.post_attention_layernorm = Norm64(layer.post_attention_layernorm)
    return model


@torch.no_grad()
def logits_of(model: LlamaForCausalLM, ids: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Teacher-forced logits, [tokens, vocabulary]."""
    return model(input_ids=torch.tensor([ids]), attention_mask=mask, use_cache=False).logits[0]


@dataclass
class Runs:
    """The same weights four times: the float32 that goldens hold, and what its bounds are measured against."""

    float32: LlamaForCausalLM
    others: dict[str, LlamaForCausalLM]

    @classmethod
    def of(cls, folder: Path) -> "Runs":
        float32 = load(folder, torch.float32)
        others = {
            "float64": in_float64(float32),
            "float64_with_float32_parts": copy.deepcopy(float32).double(),
            "bfloat16": load(folder, torch.bfloat16),
        }
        return cls(float32, others)


# ---- the numbers of one prompt ----


def short(x) -> float:
    """The shortest decimal that reads back as the same float32."""
    return float(str(np.float32(x)))


def shorts(xs) -> list[float]:
    return [short(x) for x in xs]


def chosen_positions(tokens: int) -> list[int]:
    """Those around every segment border, the first and last few, some where tiles of 32 end, and 24 spread evenly."""
    wanted = {0, 1, 2, 31, 32, 33, 63, 64, tokens - 2, tokens - 1}
    for border in range(SEGMENT, tokens + 1, SEGMENT):
        wanted |= {border - 2, border - 1, border, border + 1}
    wanted |= set(np.linspace(0, tokens - 1, 24).astype(int).tolist())
    return sorted(p for p in wanted if 0 <= p < tokens)


def logprobs_of(logits: torch.Tensor) -> torch.Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide, dim=-1)


def distance(base: torch.Tensor, other: torch.Tensor, ids: list[int]) -> dict:
    """How far two runs of one prompt are apart. `nll` is the mean over tokens of the absolute difference: the
    difference of the two means would be small by cancelling."""
    logits = logprobs = nll = 0.0
    for start in range(0, len(ids), 256):
        a, b = base[start : start + 256], other[start : start + 256]
        logits = max(logits, (a.double() - b.double()).abs().max().item())
        delta = (logprobs_of(a).double() - logprobs_of(b).double()).abs()
        logprobs = max(logprobs, delta.max().item())
        following = ids[start + 1 : start + 257]
        nll += sum(delta[i, token].item() for i, token in enumerate(following))
    return {"logits": short(logits), "logprobs": short(logprobs), "nll": short(nll / (len(ids) - 1))}


def prompt_golden(
    name: str, runs: Runs, ids: list[int], positions: list[int], probe_ids: list[int], full: bool
) -> dict:
    """Everything recorded of one prompt. `full` keeps all logits besides."""
    logits = logits_of(runs.float32, ids)
    logprobs = torch.cat([logprobs_of(chunk) for chunk in logits.split(256)])
    best = torch.topk(logits, 2, dim=-1)
    golden = {
        "name": name,
        "ids": ids,
        "mean_nll": short(-np.mean([logprobs[i, t].item() for i, t in enumerate(ids[1:])], dtype=np.float64)),
        "distance": {k: distance(logits, logits_of(m, ids), ids) for k, m in runs.others.items()},
        # max and first index: the lowest id among equals, as greedy takes it
        "argmax": [int(row.argmax()) for row in logits.numpy()],
        "top2_gap": shorts((best.values[:, 0] - best.values[:, 1]).numpy()),
        "probe_ids": probe_ids,
        "positions": [position_golden(p, logits[p].numpy(), logprobs[p].numpy(), probe_ids) for p in positions],
    }
    if full:
        golden["logits"] = [shorts(row) for row in logits.numpy()]
    return golden


def position_golden(position: int, logits: np.ndarray, logprobs: np.ndarray, probe_ids: list[int]) -> dict:
    order = np.argsort(-logits, kind="stable")[:TOP]
    wide = logits.astype(np.float64)
    logsumexp = wide.max() + np.log(np.exp(wide - wide.max()).sum())
    return {
        "position": position,
        "logsumexp": short(logsumexp),
        "top_ids": order.tolist(),
        "top_logprobs": shorts(logprobs[order]),
        "probe_logits": shorts(logits[probe_ids]),
    }


# ---- what a mistake would look like ----


def swap_query_heads(model: LlamaForCausalLM) -> bool:
    """As if query head h read KV head h % kv_heads instead of h // group."""
    config = model.config
    heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if kv in (1, heads):
        return False
    order = torch.arange(heads).reshape(kv, heads // kv).T.flatten()
    for layer in model.model.layers:
        attention = layer.self_attn
        rows = (order[:, None] * dim + torch.arange(dim)).flatten()
        attention.q_proj.weight.data = attention.q_proj.weight.data[rows]
        attention.o_proj.weight.data = attention.o_proj.weight.data[:, rows]
        if attention.q_proj.bias is not None:
            attention.q_proj.bias.data = attention.q_proj.bias.data[rows]
    return True


def interleave_rotary(model: LlamaForCausalLM) -> bool:
    """As if rows of q and k stood in pairs (0,1), (2,3), …, the order of the original Llama files and of GGUF."""
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            for tensor in (projection.weight, projection.bias):
                if tensor is not None:
                    by_head = tensor.data.reshape(-1, 2, model.config.head_dim // 2, *tensor.shape[1:])
                    tensor.data = by_head.transpose(1, 2).reshape(tensor.shape).contiguous()
    return True


def drop_rope_scaling(model: LlamaForCausalLM) -> bool:
    rope = model.config.rope_parameters
    if rope["rope_type"] == "default":
        return False
    dim = model.config.head_dim
    model.model.rotary_emb.inv_freq = rope["rope_theta"] ** -(torch.arange(0, dim, 2).float() / dim)
    return True


def scale_from_width(model: LlamaForCausalLM) -> bool:
    """As if the scale of attention came from hidden / heads though head_dim says otherwise."""
    config = model.config
    if config.hidden_size == config.head_dim * config.num_attention_heads:
        return False
    for layer in model.model.layers:
        layer.self_attn.scaling = (config.hidden_size / config.num_attention_heads) ** -0.5
    return True


def drop_biases(model: LlamaForCausalLM, of: str) -> bool:
    biases = [p for n, p in model.named_parameters() if n.endswith(".bias") and of in n]
    for bias in biases:
        bias.data.zero_()
    return bool(biases)


def default_eps(model: LlamaForCausalLM) -> bool:
    """As if rms_norm_eps were transformers' default, 1e-6."""
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.variance_epsilon = 1e-6
    return True


def exact_gelu(model: LlamaForCausalLM) -> bool:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()
    return True


MISTAKES = {
    "rotary_pairs_interleaved": interleave_rotary,
    "rope_scaling_dropped": drop_rope_scaling,
    "query_heads_on_wrong_kv_head": swap_query_heads,
    "attention_scale_from_width": scale_from_width,
    "attention_biases_dropped": lambda m: drop_biases(m, "self_attn"),
    "mlp_biases_dropped": lambda m: drop_biases(m, "mlp"),
    "norm_eps_default": default_eps,
    "gelu_for_silu": exact_gelu,
}


def sensitivity(model: LlamaForCausalLM, ids: list[int]) -> dict:
    """For each mistake that this model can show, the largest change of any logit: what a test's bound must be far
    below."""
    base = logits_of(model, ids)
    change = lambda logits: short((logits - base).abs().max().item())
    found = {}
    for name, mistake in MISTAKES.items():
        wrong = copy.deepcopy(model)
        if mistake(wrong):
            found[name] = change(logits_of(wrong, ids))
    # The first key of the second segment unseen by every later row: the smallest slip at a segment's border.
    mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
    if change(logits_of(model, ids, mask[None, None])) > 1e-4:
        raise SystemExit("transformers does not take the mask as it is given")
    mask[SEGMENT + 1 :, SEGMENT] = float("-inf")
    found["key_256_hidden"] = change(logits_of(model, ids, mask[None, None]))
    return found


# ---- modes ----


def make_models(threads: int) -> None:
    """Mode `models`: folders under models/, and model-<name>.json for each."""
    torch.set_num_threads(threads)
    allow_any_hidden_size()
    for micro in MICRO_MODELS:
        folder = GOLDEN / "models" / micro.name
        shutil.rmtree(folder, ignore_errors=True)
        write_folder(micro, folder)
        runs = Runs.of(folder)
        rng = np.random.RandomState(micro.seed + 1000)
        vocab = micro.config["vocab_size"]
        prompt_ids = {n: rng.randint(3, vocab, size).tolist() for n, size in PROMPT_TOKENS.items()}
        probe_ids = sorted(rng.choice(vocab, PROBES, replace=False).tolist())
        value = {
            "provenance": provenance("models", PACKAGES, seed=micro.seed, **_machine(threads)),
            "model": micro.name,
            "sha256": sha256_of(folder, ["config.json", "*.safetensors"]),
            "vocab_size": vocab,
            "weights_dtype": str(micro.dtype).removeprefix("torch."),
            "prompts": [
                prompt_golden(n, runs, ids, chosen_positions(len(ids)), probe_ids, full=n == "short")
                for n, ids in prompt_ids.items()
            ],
            "sensitivity": sensitivity(runs.float32, prompt_ids["long"]),
        }
        write_golden(GOLDEN / f"model-{micro.name}.json", value)


PROMPT_TOKENS = {"short": 12, "medium": 65, "long": 531}


def make_texts(folder: Path, name: str, threads: int) -> None:
    """Mode `texts`: text-<name>.json of a given folder, its own tokenizer on the texts of texts/."""
    torch.set_num_threads(threads)
    allow_any_hidden_size()
    runs = Runs.of(folder)
    config = runs.float32.config
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = read_texts()
    texts[-1] = (texts[-1][0], long_text(texts))
    prompts = []
    for title, text in texts:
        ids = tokenizer.encode(text).ids
        is_long = title == texts[-1][0]
        limit = min(LONG_TOKENS, config.max_position_embeddings)
        if is_long and len(ids) < limit:
            raise SystemExit(f"the long text has {len(ids)} tokens, {limit} are wanted")
        ids = ids[: limit if is_long else config.max_position_embeddings]
        positions = list(range(len(ids))) if len(ids) <= ALL_POSITIONS_MAX else chosen_positions(len(ids))
        prompts.append(prompt_golden(title, runs, ids, positions, [], full=False))
        print(f"  {title}: {len(ids)} tokens, mean NLL {prompts[-1]['mean_nll']}", flush=True)
    stored = json.loads((folder / "config.json").read_text())
    value = {
        "provenance": provenance(f"texts DIR {name}", PACKAGES, seed=None, **_machine(threads)),
        "model": name,
        "sha256": sha256_of(folder, ["config.json", "*.safetensors", "tokenizer.json"]),
        "vocab_size": config.vocab_size,
        "weights_dtype": stored.get("dtype", stored.get("torch_dtype")),
        "prompts": prompts,
        "sensitivity": sensitivity(runs.float32, prompts[-1]["ids"][: 2 * SEGMENT]),
    }
    write_golden(GOLDEN / f"text-{name}.json", value)


def long_text(texts: list[tuple[str, str]]) -> str:
    """The short texts, the long one, the short ones again: what comes back is only foretold by attention that reaches
    a thousand tokens back through the right rotary angles."""
    shorts_joined = "\n".join(text for _, text in texts[:-1])
    return f"{shorts_joined}\n{texts[-1][1]}\n{shorts_joined}"


def _machine(threads: int) -> dict:
    return {"dtype": "float32", "threads": threads, "cpu": torch.backends.cpu.get_cpu_capability()}
