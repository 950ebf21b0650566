"""README.md of an exported folder: front matter for the hub, use by runtime, limits."""

import dataclasses
from collections.abc import Mapping, Sequence

from huggingface_hub import EvalResult, ModelCardData

from moe_embed_jax.interop import nomic
from moe_embed_jax.interop.card_config import CardConfig
from moe_embed_jax.interop.gguf import gguf_facts, ollama_fact
from moe_embed_jax.interop.prompts import SYMMETRIC_TYPES
from moe_embed_jax.interop.sentence_transformers import POOLING_MODES
from moe_embed_jax.markdown_table import markdown_table
from moe_embed_jax.models.encoder import EncoderConfig, count_params

CARD = "README.md"
UNNAMED = "FOLDER"


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an exported folder holds, as its card says it.

    Attributes:
      prompts: as in the folder, see `exported_prompts`.
      max_length: of a text, in tokens.
      matryoshka_dims: widths that were trained, from wide to narrow.
      output_bias: root mean square of the experts' output biases; 0: none.
      is_bert: the layout of BERT, which needs no code.
      onnx: names of ONNX files.
      scores: as of `card_results`.
    """

    model: EncoderConfig
    prompts: Mapping[str, str]
    max_length: int
    matryoshka_dims: Sequence[int] = ()
    output_bias: float = 0.0
    is_bert: bool = False
    onnx: Sequence[str] = ()
    scores: Sequence[dict] = ()


def model_card(exported: Exported, card: CardConfig) -> str:
    """The text of README.md."""
    model, name = exported.model, card.name or UNNAMED
    total, active = count_params(model)
    lines = [f"# {card.name or 'Text embedding model'}", ""]
    lines += [
        f"{model.num_layers} layers of width {model.width}, {POOLING_MODES[model.pooling]} "
        f"pooling, vectors of length 1. {total:,} parameters, of which a token uses {active:,} "
        f"({model.vocab_size * model.width:,} of them are the word table)."
    ]
    if model.num_moe_layers:
        lines[-1] += (
            f" {model.num_moe_layers} layers have {model.num_experts} experts, of which a token "
            f"uses {model.experts_per_token}."
        )
    lines += ["", *_inputs(exported), "", *_use(exported, name), *_limits(exported)]
    if exported.scores:
        keys = ("dataset_name", "metric_type", "metric_value")
        rows = [[score[key] for key in keys] for score in exported.scores]
        lines += ["", "## Evaluation", "", markdown_table(["data", "metric", "score"], rows, "llr")]
    lines += ["", *_mteb(exported, card, total, active)]
    return f"---\n{front_matter(exported, card)}\n---\n" + "\n".join(lines) + "\n"


def front_matter(exported: Exported, card: CardConfig) -> str:
    """YAML as the hub expects it."""
    tags = ["sentence-transformers", "feature-extraction", "sentence-similarity"]
    tags += ["mixture-of-experts"] * (exported.model.num_moe_layers > 0)
    tags += ["custom_code"] * (not exported.is_bert) + card.listed("tags")
    data = ModelCardData(
        license=card.license or None,
        language=card.listed("languages") or None,
        base_model=card.base_model or None,
        datasets=card.listed("datasets") or None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=list(dict.fromkeys(tags)),
        metrics=sorted({score["metric_type"] for score in exported.scores}) or None,
        model_name=(card.name.partition("/")[2] or "model") if exported.scores else None,
        eval_results=[EvalResult(**score) for score in exported.scores] or None,
    )
    return data.to_yaml()


def _inputs(exported: Exported) -> list[str]:
    prompts = exported.prompts
    lines = ["## Prefixes and length", ""]
    if any(prompts.values()):
        lines += [
            "The model was trained with these texts in front of each input. sentence-transformers "
            "adds them where `prompt_name` says so (`encode_query` and `encode_document` do). "
            "**Servers add none**: put them before each text yourself.",
            "",
            markdown_table(
                ["prefix", "names of the prompt"],
                [[f"`{text}`", ", ".join(names)] for text, names in _by_text(prompts).items()],
                "l",
            ),
        ]
    else:
        lines += ["Texts are embedded as they are: the model has no prefixes."]
    lines += ["", f"Texts are cut at {exported.max_length} tokens, prefix and specials included."]
    if exported.matryoshka_dims:
        widths = ", ".join(map(str, exported.matryoshka_dims))
        lines += [
            "",
            f"Vectors may be cut to their first features; trained widths: {widths}. Normalise "
            "after the cut (sentence-transformers: `truncate_dim=..., normalize_embeddings=True`).",
        ]
    return lines


def _by_text(prompts: Mapping[str, str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name in sorted(prompts, key=lambda name: (name in SYMMETRIC_TYPES, name != "query")):
        if prompts[name]:
            names.setdefault(prompts[name], []).append(name)
    return names


def _use(exported: Exported, name: str) -> list[str]:
    trust = "" if exported.is_bert else ", trust_remote_code=True"
    server = "" if exported.is_bert else " --trust-remote-code"
    query = exported.prompts.get("query", "")
    text = f"{query}how do I ..."
    lines = [
        "## Use",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        f'model = SentenceTransformer("{name}"{trust})',
        'queries = model.encode_query(["..."])',
        'documents = model.encode_document(["..."])',
        "```",
        "",
    ]
    if trust:
        lines += [
            "The model is defined by `modeling_moe_embed.py` in this folder, plain PyTorch; "
            "without `trust_remote_code=True` loading is an error.",
            "",
        ]
    lines += [
        "float32 is what was measured. bfloat16 needs half of the memory "
        '(`model_kwargs={"dtype": "bfloat16"}`); float16 was not tried.',
        "",
    ]
    if exported.onnx:
        files = ", ".join(f"`onnx/{file}`" for file in exported.onnx)
        lines += [
            f'ONNX ({files}): `SentenceTransformer("{name}", backend="onnx"{trust})`.',
            "",
        ]
    published = exported.is_bert or not nomic.extensions(exported.model)
    if published:
        vllm = f"vLLM, whose default is float16: `vllm serve {name}{server} --dtype bfloat16`"
    else:
        vllm = (
            "vLLM, by its Transformers backend (its conditions hold, it was not run): "
            f"`vllm serve {name}{server} --dtype bfloat16 --enforce-eager`"
        )
    lines += [
        f"* {vllm}; then send `{text}`.",
        (
            f"* text-embeddings-inference: `--model-id {name}`; then send `{text}`."
            if published
            else "* text-embeddings-inference: only with an ONNX file (`export --onnx`)."
        ),
        *(
            f"* {fact}"
            for fact in gguf_facts(exported.model, exported.output_bias, exported.is_bert)
        ),
        f"* {ollama_fact(exported.model, exported.output_bias, exported.is_bert)}",
    ]
    return lines


def _limits(exported: Exported) -> list[str]:
    """What the folder is not."""
    special = [] if exported.is_bert else nomic.extensions(exported.model)
    if not special:
        return []
    return [
        "",
        f"Beyond the published architecture the model has {', '.join(special)}: runtimes with code "
        "of their own for that do not take it.",
    ]


def _mteb(exported: Exported, card: CardConfig, total: int, active: int) -> list[str]:
    """Python for MTEB's registry of models."""
    model, words = exported.model, exported.model.vocab_size * exported.model.width
    prompts = {
        name: text
        for name, text in exported.prompts.items()
        if name in ("query", "document", *SYMMETRIC_TYPES) and text
    }
    loader = {} if exported.is_bert else {"trust_remote_code": True}
    loader |= {"model_prompts": prompts} if prompts else {}
    datasets, has_onnx = set(card.listed("mteb_datasets")), bool(exported.onnx)
    fields = {
        "loader_kwargs": loader,
        "name": card.name or "OWNER/NAME",
        "revision": None,
        "release_date": None,
        "languages": None,
        "n_parameters": total,
        "n_embedding_parameters": words,
        "n_active_parameters_override": active - words if model.num_moe_layers else None,
        "memory_usage_mb": round(4 * total / 2**20),
        "max_tokens": exported.max_length,
        "embed_dim": list(exported.matryoshka_dims) or model.width,
        "license": card.license or None,
        "open_weights": True,
        "public_training_code": None,
        "public_training_data": None,
        "framework": ["Sentence Transformers", "PyTorch", "safetensors", *["ONNX"] * has_onnx],
        "reference": f"https://huggingface.co/{card.name}" if card.name else None,
        "use_instructions": bool(prompts),
        "training_datasets": datasets or None,
        "adapted_from": card.base_model or None,
    }
    return [
        "## MTEB",
        "",
        'For MTEB\'s registry. `revision`, `release_date` and `languages` ("eng-Latn") are known '
        "after the upload; `training_datasets` are MTEB's names of what was trained on.",
        "",
        "```python",
        "from mteb.models.model_meta import ModelMeta, ScoringFunction",
        "from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper",
        "",
        "meta = ModelMeta(",
        "    loader=SentenceTransformerEncoderWrapper,",
        *(f"    {key}={value!r}," for key, value in fields.items()),
        "    similarity_fn_name=ScoringFunction.COSINE,",
        ")",
        "```",
    ]
