"""What launch/convert.py does: import, export, upcycle, merge and upload model folders."""

import dataclasses
import pathlib

import jax
import numpy as np

from moe_embed_jax import storage
from moe_embed_jax.config import differences
from moe_embed_jax.embedder import Embedder
from moe_embed_jax.errors import UserError
from moe_embed_jax.interop import export, nomic
from moe_embed_jax.interop.card_config import CardConfig
from moe_embed_jax.interop.card_results import mteb_scores, run_scores
from moe_embed_jax.interop.hub import check_push, files_to_push, push
from moe_embed_jax.interop.layers import by_layer, from_layers
from moe_embed_jax.interop.merge import match_experts, merge
from moe_embed_jax.interop.merge_config import MergeConfig, split_step
from moe_embed_jax.interop.output_bias import check_output_bias, drop_output_bias
from moe_embed_jax.interop.prompts import own_prompts, with_document_prefix
from moe_embed_jax.interop.published import has_mlm_head, read_config
from moe_embed_jax.interop.source import HUB, source_folder
from moe_embed_jax.interop.upcycle import upcycle, upcycled_model
from moe_embed_jax.interop.verify.golden import golden_texts, golden_vectors
from moe_embed_jax.made_by import done_before, hash_command
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.model_folder import (
    LoadedModel,
    ModelFolder,
    is_run,
    open_model,
    place,
    save_model,
    weights_folder,
)
from moe_embed_jax.models.encoder import EncoderConfig, count_params
from moe_embed_jax.models.encoder_config import architecture
from moe_embed_jax.models.upcycle_config import UpcycleConfig


def import_model(
    source,
    target,
    positions: str | None = None,
    vocabulary: str | None = None,
    query_prefix: str | None = None,
    document_prefix: str | None = None,
    dry_run: bool = False,
    progress=iter,
) -> bool:
    """A published checkpoint to a folder of ours. `progress` wraps an iterable, as tqdm does.

    Returns: False if the same call was finished before; nothing is done then.
    """
    folder = source_folder(source)
    options = [positions, query_prefix, document_prefix]
    command = _command("import", folder, vocabulary, options)
    if done_before(target, command):
        return False
    if is_run(folder):
        raise UserError(f"{source} is a model folder of ours already: nothing to import")
    positions = positions or _default_positions(folder)
    opened = _open(folder, vocabulary, query_prefix, document_prefix, positions=positions)
    _say(opened)
    if opened.unused:
        print(f"not needed  {', '.join(opened.unused)}")
    if not dry_run:
        loaded = opened.load(single_device_mesh(), progress)
        save_model(storage.path(target), loaded, origin=str(source), command=command)
    return True


def _default_positions(folder: pathlib.Path) -> str:
    """XLM-RoBERTa with its language-model head is stage 1's start; other encoders are kept exact.

    Raises `UserError` for XLM-RoBERTa without the head: it may be either.
    """
    head = has_mlm_head(weights_folder(folder))
    if head is None:
        return "learned"
    if head:
        return "rotary"
    raise UserError(
        f"{folder} is an XLM-RoBERTa encoder without a language-model head: say "
        "--positions=learned (an embedding model, kept exactly) or --positions=rotary (the "
        "position table is dropped; the encoder then needs stage 1)"
    )


def export_model(
    source,
    target,
    step: int | None = None,
    vocabulary: str | None = None,
    query_prefix: str | None = None,
    document_prefix: str | None = None,
    onnx: str | None = None,
    drop_expert_output_bias: bool = False,
    card: CardConfig | None = None,
    dry_run: bool = False,
    progress=iter,
) -> bool:
    """Any model folder to a self-contained one for PyTorch, see `interop.export`.

    onnx: files of ONNX to write too, see `interop.onnx_export`. drop_expert_output_bias: for exact
    GGUF files; what it costs is printed.

    Returns: False if the same call was finished before; nothing is done then.
    """
    folder = source_folder(source)
    card = card or CardConfig()
    options = [step, query_prefix, document_prefix, *([onnx] if onnx else [])]
    options += ["drop_expert_output_bias"] * drop_expert_output_bias
    options += [dataclasses.asdict(card)] * (card != CardConfig())
    command = _command("export", folder, vocabulary, options)
    if done_before(target, command):
        return False
    scores = mteb_scores(card.evaluation) if card.evaluation else run_scores(folder)
    card = dataclasses.replace(card, base_model=card.base_model or _base_model(folder))
    opened = _open(folder, vocabulary, query_prefix, document_prefix, step=step)
    _say(opened)
    if drop_expert_output_bias:
        check_output_bias(opened.model)
    as_bert = export.leaves_as_bert(opened.model)
    print("layout      " + ("bert" if as_bert else "nomic_bert, needs trust_remote_code"))
    if opened.vocabulary is None:
        print(
            "note        no tokenizer: the exported model takes token ids only (--vocabulary=...)"
        )
    if not as_bert and (special := nomic.extensions(opened.model)):
        print(f"note        {', '.join(special)}: only the folder's own PyTorch code knows that")
    if not dry_run:
        loaded = opened.load(single_device_mesh())
        if drop_expert_output_bias:
            _drop_output_bias(loaded)
        export.write_folder(
            target,
            loaded.model,
            loaded.params,
            loaded.vocabulary,
            loaded.prompts,
            max(loaded.max_lengths.values()),
            loaded.matryoshka_dims,
            progress,
            command,
            onnx,
            card,
            scores,
        )
    return True


def _base_model(folder: pathlib.Path) -> str:
    """OWNER/NAME on the hub of what a folder of ours was trained from or imported from; or ""."""
    config = read_config(weights_folder(folder)) if is_run(folder) else {}
    start = config.get("init", {}).get("source") or config.get("origin") or ""
    return start.removeprefix(HUB).partition("@")[0] if start.startswith(HUB) else ""


def _drop_output_bias(loaded: LoadedModel) -> None:
    """Takes the bias out of `loaded`, and prints how far that moves the golden texts' vectors."""
    lengths, mesh = loaded.max_lengths, single_device_mesh()
    texts = golden_texts(max(lengths.values()))

    def embed():
        arguments = (loaded.model, loaded.params, loaded.vocabulary, lengths, mesh, loaded.prompts)
        return golden_vectors(Embedder(*arguments), texts)

    before = None if loaded.vocabulary is None else embed()
    loaded.model, loaded.params, size = drop_output_bias(loaded.model, loaded.params)
    print(f"dropped     output bias of the experts, root mean square {size:.3g}")
    if before is None:
        print("note        no tokenizer, so what that costs was not measured")
        return
    cosines = np.sum(before * embed(), axis=1)
    print(
        f"            {len(cosines)} texts: cosine to the vectors with it {cosines.min():.5f} at "
        f"least, {cosines.mean():.5f} on average; evaluate both before you use the new one"
    )


def push_model(
    source,
    target: str,
    private: bool = False,
    message: str = "Upload the model",
    dry_run: bool = False,
) -> None:
    """An exported folder to `target`, OWNER/NAME, on the hub; see `interop.hub`."""
    folder, notes = check_push(source, target)
    files = files_to_push(folder)
    for name, size in files.items():
        print(f"{size:>14,}  {name}")
    print(f"{sum(files.values()):>14,}  bytes in {len(files)} files")
    for note in notes:
        print(f"note        {note}")
    if not dry_run:
        print(push(folder, target, private, message))


def upcycle_model(
    source,
    target,
    mode: str,
    num_experts: int = UpcycleConfig.num_experts,
    experts_per_token: int = UpcycleConfig.experts_per_token,
    moe_every: int = UpcycleConfig.moe_every,
    noise: float = UpcycleConfig.noise,
    seed: int = UpcycleConfig.seed,
    step: int | None = None,
    vocabulary: str | None = None,
    query_prefix: str | None = None,
    document_prefix: str | None = None,
    dry_run: bool = False,
    progress=iter,
) -> bool:
    """A dense encoder to an MoE encoder in a folder of ours, see `interop.upcycle`.

    Returns: False if the same call was finished before; nothing is done then.
    """
    config = UpcycleConfig(mode, num_experts, experts_per_token, moe_every, noise, seed)
    folder = source_folder(source)
    options = [dataclasses.asdict(config), step, query_prefix, document_prefix]
    command = _command("upcycle", folder, vocabulary, options)
    if done_before(target, command):
        return False
    opened = _open(folder, vocabulary, query_prefix, document_prefix, step=step)
    model = upcycled_model(opened.model, config)
    _say(opened, model)
    if mode == "paper":
        print(
            "note        as the paper's code: biases dropped, gates sum to less than 1, so the MoE"
        )
        print("            branches start at about 0.4 of the dense ones and outputs change")
    if dry_run:
        return True
    mesh = single_device_mesh()
    loaded = opened.load(mesh, progress)
    loaded.model, params = upcycle(loaded.model, loaded.params, config)
    loaded.params = place(params, loaded.model, mesh)
    origin = f"{source}, upcycled: {mode}, seed {seed}, noise {noise}"
    save_model(storage.path(target), loaded, origin, command)
    return True


def merge_models(
    sources: list[str],
    target,
    config: MergeConfig,
    dry_run: bool = False,
    progress=iter,
) -> bool:
    """Models of one architecture, tokenizer and prompts to one, see `interop.merge`.

    Args:
      sources: model folders; FOLDER@STEP is a checkpoint of a training run. The first one gives
        the experts their order, and lengths and widths.

    Returns: False if the same call was finished before; nothing is done then.
    """
    shares = config.shares(len(sources))
    places = [split_step(source) for source in sources]
    folders = [source_folder(name) for name, _ in places]
    steps = [step for _, step in places]
    command = hash_command("merge", [dataclasses.asdict(config), steps], folders)
    if done_before(target, command):
        return False
    opened = [open_model(folder, step) for folder, step in zip(folders, steps, strict=True)]
    for source, each in zip(sources[1:], opened[1:], strict=True):
        _check_mergeable(each, opened[0], source, sources[0])
    _say(opened[0])
    for source, share in zip(sources, shares, strict=True):
        print(f"{share:<11.3f} {source}")
    if dry_run:
        return True
    model, mesh = opened[0].model, single_device_mesh()
    merged, *others = [each.load(mesh) for each in progress(opened)]
    arrays = [by_layer(model, each.params) for each in (merged, *others)]
    if not config.keep_expert_order and model.num_moe_layers:
        for i, source in enumerate(sources[1:], start=1):
            arrays[i], orders = match_experts(model, arrays[i], arrays[0])
            _say_orders(source, orders)
    params = from_layers(model, merge(config.method, arrays, shares).items())
    merged.params = place(params, model, mesh)
    heads = [each.mlm_head for each in (merged, *others)]
    merged.mlm_head = None if None in heads else _merge_heads(config.method, heads, shares)
    origin = f"{config.method} of {' '.join(sources)}, shares {shares}"
    save_model(storage.path(target), merged, origin, command)
    return True


def _check_mergeable(opened: ModelFolder, first: ModelFolder, name: str, first_name: str) -> None:
    """Raises `UserError` that names what two models do not share."""
    theirs, ours = (
        {
            "model": architecture(each.model),
            "tokenizer": each.vocabulary and each.vocabulary.content_hash[:12],
            "prompts": own_prompts(each.prompts),
        }
        for each in (first, opened)
    )
    if lines := differences(theirs, ours):
        raise UserError(
            f"{first_name} and {name} cannot be merged, they differ: {'; '.join(lines)}"
        )


def _say_orders(source: str, orders: dict[int, np.ndarray]) -> None:
    moved = {
        layer: order_E
        for layer, order_E in orders.items()
        if (order_E != np.arange(len(order_E))).any()
    }
    print(f"experts     {source}: in the first model's order but for {len(moved)} layer(s)")
    for layer, order_E in moved.items():
        print(f"            layer {layer}: {' '.join(map(str, order_E))}")


def _merge_heads(method: str, heads: list[dict], shares: list[float]) -> dict:
    leaves, structures = zip(*(jax.tree.flatten(head) for head in heads), strict=True)
    arrays = [{str(i): np.asarray(leaf) for i, leaf in enumerate(each)} for each in leaves]
    return structures[0].unflatten(merge(method, arrays, shares).values())


def _command(name: str, folder: pathlib.Path, vocabulary: str | None, options: list) -> str:
    """Of `made_by`: what stands for this conversion."""
    return hash_command(name, options, [folder, *([vocabulary] if vocabulary else [])])


def _open(
    source,
    vocabulary: str | None,
    query_prefix: str | None,
    document_prefix: str | None,
    **options,
) -> ModelFolder:
    """The checked source with the prompts of the command line."""
    opened = open_model(source, vocabulary=vocabulary, **options)
    if query_prefix is not None:
        opened.prompts["query"] = query_prefix
    if document_prefix is not None:
        opened.prompts = with_document_prefix(opened.prompts, document_prefix)
    return opened


def _say(opened: ModelFolder, model: EncoderConfig | None = None) -> None:
    model = model or opened.model
    total, active = count_params(model)
    experts = (
        f"{model.num_moe_layers} with {model.num_experts} experts, top-{model.experts_per_token}"
        if model.num_moe_layers
        else "dense"
    )
    ids = "no tokenizer" if opened.vocabulary is None else f"{opened.vocabulary.size:,} ids"
    lengths = sorted(set(opened.max_lengths.values()))
    print(f"model       {total:,} parameters, {active:,} active per token")
    print(
        f"            {model.num_layers} layers of width {model.width} ({experts}), "
        f"{model.positions} positions, {model.vocab_size:,} rows of words, "
        f"pooling {model.pooling}"
    )
    print(f"tokenizer   {ids}; up to {' / '.join(map(str, lengths))} tokens")
    for note in opened.notes:
        print(f"note        {note}")
    print(f"prompts     {', '.join(f'{n} {t!r}' for n, t in sorted(opened.prompts.items()))}")
