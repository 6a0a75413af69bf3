"""A base -> tokenizer, config and backbone. Weights only as safetensors; code of a repository only when named."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from tunesmith.errors import ModelError
from tunesmith.model.folder import check_code, check_weights, explained, is_trusted, quiet, read_json, resolve
from tunesmith.model.hashing import weights_hash

Kind = Literal["causal", "masked", "classifier"]
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
_TIED_HEAD = "lm_head.weight"
_FACTORIES: dict[str, Any] = {
    "causal": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "a causal language model"),
    "masked": (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING_NAMES, "a masked language model"),
    "classifier": (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "a classifier"),
}
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<PAD>", "<|finetune_right_pad_id|>", "<|vision_pad|>", "<|endoftext|>")
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


def load_config(base: str | Path, *, trust: str | None = None) -> Any:
    """The base's configuration. Raises ModelError for a missing folder, an unknown type, or code that was not named."""
    folder = resolve(base, trust=trust)
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    trusted = check_code(folder, base, trust, kind in CONFIG_MAPPING)
    if kind not in CONFIG_MAPPING and not trusted:
        raise ModelError(f"{base}: model_type {kind!r} in config.json is not known to this version of transformers")
    with quiet(), explained(base, "configuration"):
        found = AutoConfig.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
    if not hasattr(found.get_text_config(), "pad_token_id"):  # families that know no padding (CodeGen, RWKV)
        found.get_text_config().pad_token_id = None
    return found


def load_tokenizer(base: str | Path, *, trust: str | None = None) -> Any:
    """The base's tokenizer, with a pad token: a pad-like one it has, else unk, else the end token. It never grows."""
    folder = resolve(base, trust=trust)
    known = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
    if not any((folder / name).is_file() for name in known):
        raise ModelError(f"{base} has no tokenizer (looked for {', '.join(known)}): copy the original's files there")
    trusted = False
    if (folder / "tokenizer_config.json").is_file() and read_json(folder / "tokenizer_config.json").get("auto_map"):
        trusted = is_trusted(base, trust)
    with quiet(), explained(base, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
    _ensure_pad(tokenizer)
    return tokenizer


def _ensure_pad(tokenizer: Any) -> None:
    if tokenizer.pad_token_id is not None:
        return
    vocabulary = tokenizer.get_vocab()
    found = next((name for name in _PAD_NAMES if name in vocabulary and name != tokenizer.eos_token), None)
    tokenizer.pad_token = found or tokenizer.unk_token or tokenizer.eos_token or next(iter(vocabulary))


def load_backbone(
    base: str | Path,
    kind: Kind,
    *,
    dtype: torch.dtype | None = torch.float32,
    label_names: Sequence[str] | None = None,
    problem: Problem | None = None,
    seed: int = 0,
    trust: str | None = None,
) -> Any:
    """The transformers model of the base's own class, in eval mode on the CPU; `dtype` None keeps the stored one.

    A classifier's head is new, drawn from `seed` alone, unless the base was saved with the same label names. Names of
    the parameters that the file did not have are kept in `backbone.tunesmith_new`. Tokens that were added to the base's
    tokenizer get rows of their own, the mean of the others; how many stands in `backbone.tunesmith_grown`. Whether
    `trust` names this base stands in `backbone.tunesmith_trusted`.
    """
    folder = resolve(base, trust=trust)
    config = load_config(base, trust=trust)
    _refuse_unfit(base, config, kind)
    check_weights(folder, base)
    keep_head = _set_labels(config, label_names, problem) if kind == "classifier" else True
    with quiet(), explained(base, "weights"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone, info = _FACTORIES[kind][0].from_pretrained(
            folder,
            config=config,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=bool(getattr(config, "auto_map", None)) and is_trusted(base, trust),
            ignore_mismatched_sizes=kind == "classifier",
            output_loading_info=True,
        )
    mismatched = {item[0] if isinstance(item, tuple) else item for item in info["mismatched_keys"]}
    missing = _without_tied(folder, backbone, set(info["missing_keys"]))
    _start_missing(base, backbone, missing | mismatched, kind, keep_head, seed)
    _check_vocabulary(base, folder, backbone, trust)
    backbone.tunesmith_trusted = is_trusted(base, trust)
    return backbone.eval()


def load_empty(base: str | Path, kind: Kind, *, classes: int = 2, trust: str | None = None) -> Any:
    """The backbone without weights, on the meta device: shapes alone, rows of added tokens too, for planning."""
    config = load_config(base, trust=trust)
    _refuse_unfit(base, config, kind)
    if kind == "classifier":
        config.num_labels = classes
    with quiet(), explained(base, "configuration"), torch.device("meta"):
        empty = _FACTORIES[kind][0].from_config(config, trust_remote_code=bool(getattr(config, "auto_map", None)))
    _check_vocabulary(base, resolve(base, trust=trust), empty, trust)
    return empty


def _refuse_unfit(base: str | Path, config: Any, kind: Kind) -> None:
    """A base of another kind is refused with the stages that fit it."""
    _, names, what = _FACTORIES[kind]
    model_type, built = config.model_type, ", ".join(config.architectures or []) or "no architecture named"
    encoder = _is_encoder(config)
    if kind == "causal" and encoder:
        raise ModelError(f"{base} ({model_type}: {built}) is an encoder, not {what}: use stage mlm or classify")
    if kind == "masked" and not encoder:
        raise ModelError(f"{base} ({model_type}: {built}) is not {what}: use stage pretrain, sft or classify")
    if model_type not in names and not getattr(config, "auto_map", None):
        raise ModelError(f"{base}: transformers has no {what.removeprefix('a ')} of type {model_type}")


def is_encoder(base: str | Path, *, trust: str | None = None) -> bool:
    """True for a base that fills in masked words instead of continuing a text. Raises what `load_config` raises."""
    return _is_encoder(load_config(base, trust=trust))


def _is_encoder(config: Any) -> bool:
    if getattr(config, "is_encoder_decoder", False):
        return False
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and not getattr(config, "is_decoder", False)


def _set_labels(config: Any, label_names: Sequence[str] | None, problem: Problem | None) -> bool:
    """Write the labels into `config`; True when the base was saved with the same ones, so that its head stays."""
    was = bool(config.architectures) and str(config.architectures[0]).endswith("ForSequenceClassification")
    before = [config.id2label[i] for i in sorted(config.id2label)]
    if label_names is not None:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: i for i, name in enumerate(label_names)}
    if problem is not None:
        config.problem_type = problem
    return was and (label_names is None or before == list(label_names))


def _without_tied(folder: Path, backbone: Any, missing: set[str]) -> set[str]:
    """What is missing still when an embedding that is stored as the output head it is tied to has been read from there.

    A classifier has no output head, so transformers does not look for it.
    """
    embedding = backbone.get_input_embeddings().weight
    name = next(name for name, parameter in backbone.named_parameters() if parameter is embedding)
    if name not in missing or not getattr(backbone.config.get_text_config(), "tie_word_embeddings", False):
        return missing
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if _TIED_HEAD in file.keys() and tuple(file.get_slice(_TIED_HEAD).get_shape()) == tuple(embedding.shape):  # noqa: SIM118
                with torch.no_grad():
                    embedding.copy_(file.get_tensor(_TIED_HEAD))
                return missing - {name}
    return missing


def _start_missing(base: str | Path, backbone: Any, missing: set[str], kind: Kind, keep_head: bool, seed: int) -> None:
    """Draw the head (and pooler) that the file did not have, from `seed`; anything else missing is an error."""
    body = f"{backbone.base_model_prefix}."
    allowed = (f"{body}pooler.",)
    new = {name for name in missing if not name.startswith(body) or name.startswith(allowed)}
    lost = sorted(missing - new)
    if kind == "causal":
        lost = sorted(missing)
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise ModelError(
            f"{base}: the weights lack {', '.join(lost[:5])}{more}: the folder is incomplete or of another model"
        )
    if not keep_head:
        new |= {name for name, _ in backbone.named_parameters() if name.startswith(("classifier.", "score."))}
        new |= {name for name, _ in backbone.named_parameters() if name.startswith("pre_classifier.")}
    parameters = dict(backbone.named_parameters())
    std = float(getattr(backbone.config, "initializer_range", None) or 0.02)
    for name in sorted(new & set(parameters)):
        _draw(parameters[name], name, std, seed)
    backbone.tunesmith_new = tuple(sorted(new & set(parameters)))


def _draw(parameter: nn.Parameter, name: str, std: float, seed: int) -> None:
    """Gaussian matrices, zero biases, norm weights of one: a function of (seed, name) alone."""
    with torch.no_grad():
        if parameter.dim() < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            return
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def _check_vocabulary(base: str | Path, folder: Path, backbone: Any, trust: str | None) -> None:
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        tokenizer = load_tokenizer(base, trust=trust)
        backbone.tunesmith_grown = fit_tokenizer(backbone, tokenizer, grow=_only_added(backbone, tokenizer))


def _only_added(backbone: Any, tokenizer: Any) -> bool:
    """True when what the embedding has no rows for was added to the tokenizer: not another model's vocabulary."""
    rows = backbone.get_input_embeddings().weight.shape[0]
    return all(i in tokenizer.added_tokens_decoder for i in tokenizer.get_vocab().values() if i >= rows)


def fit_tokenizer(backbone: Any, tokenizer: Any, *, grow: bool = False) -> int:
    """Tell the backbone the pad token; how many rows its embedding grew by, 0 unless `grow`.

    New rows are the mean of the old ones. A tokenizer with more tokens than the embedding has rows is a ModelError.
    """
    rows = backbone.get_input_embeddings().weight.shape[0]
    needed = max(tokenizer.get_vocab().values(), default=-1) + 1
    config = backbone.config.get_text_config()
    if needed > rows and not grow:
        raise ModelError(
            f"the tokenizer has {needed} tokens and the model's embedding {rows} rows: they do not belong together. "
            "Use the base's own tokenizer; new tokens are taken when they were added to it (add_tokens)"
        )
    if needed > rows:
        with quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            backbone.resize_token_embeddings(needed, mean_resizing=False)
            for module in (backbone.get_input_embeddings(), backbone.get_output_embeddings()):
                if module is not None:
                    module.weight[rows:] = module.weight[:rows].mean(0)
    if config.pad_token_id is None or config.pad_token_id >= max(rows, needed):
        config.pad_token_id = tokenizer.pad_token_id
    return max(needed - rows, 0)


def base_record(base: str | Path, *, trust: str | None = None) -> dict[str, Any]:
    """What the report says about a base: name, content hash, licence, parameters, bytes, context length, dtype."""
    folder = resolve(base, trust=trust)
    config = read_json(folder / "config.json")
    files = check_weights(folder, base)
    with explained(base, "weights"):
        tensors = [header for path in files for header in _headers(path)]
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config
    return {
        "name": str(base),
        "hash": weights_hash(folder),
        "licence": licence(folder),
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures") or [],
        "parameters": sum(size for _, size in tensors),
        "dtype": _common([kind for kind, _ in tensors]),
        "bytes": sum(path.stat().st_size for path in files),
        "context_tokens": next(
            (text[key] for key in _CONTEXT_KEYS if isinstance(text.get(key), int) and text[key] > 0), None
        ),
    }


def _headers(path: Path) -> list[tuple[str, int]]:
    """(dtype, number of elements) of every tensor, from the header alone."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(100_000_000, path.stat().st_size):
            raise ModelError(f"{path.name} is damaged: its header claims {length} bytes")
        header = json.loads(file.read(length))
    return [(entry["dtype"], math.prod(entry["shape"])) for name, entry in header.items() if name != "__metadata__"]


def _common(kinds: Sequence[str]) -> str | None:
    return max(set(kinds), key=kinds.count) if kinds else None


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The floating-point type that most weights in `folder` are stored in."""
    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    kinds = [kind for path in files for kind, _ in _headers(path) if kind in names]
    common = _common(kinds)
    return None if common is None else names[common]


def licence(folder: Path) -> str | None:
    """The licence named in the model card's front matter, else the first line of a LICENSE file."""
    card = folder / "README.md"
    if card.is_file():
        head = card.read_text(encoding="utf-8", errors="replace")[:20_000]
        front = re.match(r"---\s*\n(.*?)\n---", head, re.DOTALL)
        named = re.search(r"^license(?:_name)?:\s*[\"']?([^\s\"'#]+)", front[1], re.MULTILINE) if front else None
        if named:
            return named[1]
    for path in sorted(folder.glob("LICEN[SC]E*")):
        lines = path.read_text(encoding="utf-8", errors="replace")[:2000].strip().splitlines()
        if lines:
            return lines[0].strip()[:80]
    return None
