"""Where a run's first parameters come from: random numbers, a model folder, or an upcycled one."""

import dataclasses
import json
import pathlib

import jax

from moe_embed_jax import config as config_page
from moe_embed_jax.config import differences
from moe_embed_jax.errors import UserError
from moe_embed_jax.interop.tokenizer_files import find_tokenizer
from moe_embed_jax.interop.upcycle import UpcycleConfig, upcycle, upcycled_model
from moe_embed_jax.mesh import single_device_mesh
from moe_embed_jax.model_folder import MODEL_CARD, open_model, place
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.training.run_config import InitConfig, RunConfig, VocabularyConfig

# What a config says about a model that came from elsewhere: how it is computed, not what it is.
COMPUTE_FIELDS = ("dtype", "expert_backend", "expert_exchange", "capacity_factor", "remat_rows")


def resolve(config: RunConfig, workdir: pathlib.Path) -> tuple[RunConfig, list[str]]:
    """The config with the architecture and vocabulary of `init.source`, and what that changed.

    With `init.source` the source decides the architecture and the vocabulary, whatever `model` and
    `data.vocabulary` say (a page with one more line can start from any model); of `model` remain
    `COMPUTE_FIELDS` and, for upcycling, the experts. A resumed run takes both from its work
    directory: the source may be gone by then.

    Raises `UserError` for a source without a tokenizer.
    """
    init = config.init
    if not init.source:
        return config, []
    card_path = workdir / MODEL_CARD
    if card_path.is_file():
        card = json.loads(card_path.read_text())
        # Built, so that a key that is newer than the card has its default there.
        if config_page.build(InitConfig, card.get("init", {}), "init") == init:
            model = config_page.build(EncoderConfig, card["model"], "model")
            vocabulary = config_page.build(VocabularyConfig, card["data"]["vocabulary"])
            own_copy = find_tokenizer(workdir)
            if own_copy is not None and not pathlib.Path(vocabulary.path).is_file():
                vocabulary = dataclasses.replace(vocabulary, path=str(own_copy))
            return _replaced(config, model, vocabulary)
    opened = open_model(init.source)
    if opened.vocabulary_path is None:
        raise UserError(
            f"init.source={init.source} has no tokenizer: put its sentencepiece.bpe.model or "
            "tokenizer.json into the folder"
        )
    model = opened.model
    if init.upcycle:
        model = upcycled_model(model, upcycle_config(config))
    vocabulary = VocabularyConfig(kind="file", path=str(opened.vocabulary_path), size=0)
    return _replaced(config, model, vocabulary)


def _replaced(
    config: RunConfig, model: EncoderConfig, vocabulary: VocabularyConfig
) -> tuple[RunConfig, list[str]]:
    model = dataclasses.replace(model, **{k: getattr(config.model, k) for k in COMPUTE_FIELDS})
    data = dataclasses.replace(config.data, vocabulary=vocabulary)
    resolved = dataclasses.replace(config, model=model, data=data)
    return resolved, differences(dataclasses.asdict(config), dataclasses.asdict(resolved))


def upcycle_config(config: RunConfig) -> UpcycleConfig:
    """The upcycling of `init`, with the experts of the page's `model`."""
    model, init = config.model, config.init
    return UpcycleConfig(
        init.upcycle,
        model.num_experts,
        model.experts_per_token,
        model.moe_every,
        init.noise,
        config.seed,
    )


def initial_params(config: RunConfig, mesh: jax.sharding.Mesh) -> dict | None:
    """Parameters of `init.source` in their shardings (upcycled if so said); None: random ones.

    `config` is resolved. Every process reads the whole source.
    """
    if not config.init.source:
        return None
    opened = open_model(config.init.source)
    if not config.init.upcycle:
        return opened.load(mesh).params
    dense = opened.load(single_device_mesh())
    _, params = upcycle(dense.model, dense.params, upcycle_config(config))
    return place(params, config.model, mesh)
