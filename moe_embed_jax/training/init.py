"""Where a run's first parameters come from: random numbers, a model folder, or an upcycled one.

A run from random numbers loads no code that reads the models of others.
"""

import dataclasses
import pathlib

import jax
import numpy as np

from moe_embed_jax import config as config_files
from moe_embed_jax import storage
from moe_embed_jax.card import read_card
from moe_embed_jax.config import RUN_CONFIG, differences
from moe_embed_jax.data.data_config import VocabularyConfig
from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import replicated, single_device_mesh
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.models.encoder_config import COMPUTE_FIELDS
from moe_embed_jax.models.upcycle_config import UpcycleConfig
from moe_embed_jax.processes import to_devices
from moe_embed_jax.tokenizers.files import find_tokenizer
from moe_embed_jax.tokenizers.tokenizer_json import open_vocabulary
from moe_embed_jax.training.run_config import Run


def apply_source(config, workdir: pathlib.Path) -> tuple:
    """(the config with the architecture and vocabulary of `init.source`, what that changed).

    With `init.source` the source decides the architecture and the vocabulary, so a config leaves
    them out; of `model` it may state `COMPUTE_FIELDS`, `expert_output_bias=False`, which drops that
    bias of the source, and, for upcycling, the number of experts and where they are. A resumed run
    takes both from its work directory: the source may be gone by then.

    Raises `UserError` for a source without a tokenizer, and for a config that states another
    architecture or vocabulary; names both values.
    """
    init = config.init
    if not init.source:
        return config, []
    saved_path = workdir / RUN_CONFIG
    if storage.has_entry(saved_path):
        saved = read_card(saved_path)
        # Built, so that a key that is newer than the file has its default.
        if config_files.build(type(init), saved.get("init", {}), "init") == init:
            model = config_files.build(EncoderConfig, saved["model"], "model")
            vocabulary = config_files.build(VocabularyConfig, saved["data"]["vocabulary"])
            own_copy = find_tokenizer(workdir)
            if own_copy is not None and not storage.path(vocabulary.path).is_file():
                vocabulary = dataclasses.replace(vocabulary, path=str(own_copy))
            return _replaced(config, model, vocabulary)
    from moe_embed_jax.interop.upcycle import upcycled_model
    from moe_embed_jax.model_folder import open_model

    opened = open_model(init.source, positions=init.positions)
    if opened.vocabulary_path is None:
        raise UserError(
            f"init.source={init.source} has no tokenizer: put its sentencepiece.bpe.model or "
            "tokenizer.json into the folder"
        )
    model = opened.model
    if init.upcycle:
        model = upcycled_model(model, upcycle_config(config))
    elif _drops_output_bias(config):
        model = dataclasses.replace(model, expert_output_bias=False)
    vocabulary = VocabularyConfig(kind="file", path=str(opened.vocabulary_path), size=0)
    return _replaced(config, model, vocabulary)


def _replaced(config, model: EncoderConfig, vocabulary: VocabularyConfig) -> tuple:
    _check_stated(config, model, vocabulary)
    model = dataclasses.replace(model, **{k: getattr(config.model, k) for k in COMPUTE_FIELDS})
    data = dataclasses.replace(config.data, vocabulary=vocabulary)
    resolved = dataclasses.replace(config, model=model, data=data)
    return resolved, differences(dataclasses.asdict(config), dataclasses.asdict(resolved))


def _check_stated(config, model: EncoderConfig, vocabulary: VocabularyConfig) -> None:
    """Raises `UserError` where the config states another model than its source is."""
    stated = config_files.stated(config)
    wrong = [
        f"{key}={getattr(config.model, name)!r} (the source has {getattr(model, name)!r})"
        for name in (field.name for field in dataclasses.fields(EncoderConfig))
        if (key := f"model.{name}") in stated
        and name not in COMPUTE_FIELDS
        and getattr(config.model, name) != getattr(model, name)
    ]
    wrong += _other_vocabulary(config, vocabulary, stated)
    if wrong:
        raise UserError(
            f"init.source={config.init.source} decides the architecture and the vocabulary, and "
            f"this config states others: {', '.join(wrong)}; leave them out"
        )


def _other_vocabulary(config, vocabulary: VocabularyConfig, stated: set[str]) -> list[str]:
    """What a config states of its vocabulary that the source's is not: a size, or a file."""
    own, path = config.data.vocabulary, storage.path(vocabulary.path)
    if not any(key.startswith("data.vocabulary.") for key in stated) or not path.is_file():
        return []
    if own.kind == "train":
        size = open_vocabulary(path).size
        same = own.size == size
        return [] if same else [f"data.vocabulary.size={own.size} (the source has {size})"]
    own_path = storage.path(own.path)
    same = not own.path or (own_path.is_file() and own_path.read_bytes() == path.read_bytes())
    return [] if same else [f"data.vocabulary.path={own.path} (the source has {path})"]


def _drops_output_bias(config) -> bool:
    """Whether a config asks for a source's experts without their output bias."""
    stated = "model.expert_output_bias" in config_files.stated(config)
    return stated and not config.model.expert_output_bias


def upcycle_config(config: Run) -> UpcycleConfig:
    """The upcycling of `init`, with the experts of the config's `model`."""
    model, init = config.model, config.init
    return UpcycleConfig(
        init.upcycle,
        model.num_experts,
        model.experts_per_token,
        model.moe_every,
        init.noise,
        config.seed,
        model.expert_output_bias,
    )


def initial_params(config: Run, mesh: jax.sharding.Mesh) -> dict | None:
    """Parameters of `init.source` in their shardings, upcycled if the config asks for it; None:
    random ones.

    {"encoder": ...}, and "head" if the source has a language-model head. `config` is resolved.
    Every process reads the whole source.
    """
    if not config.init.source:
        return None
    from moe_embed_jax.interop.output_bias import drop_output_bias
    from moe_embed_jax.interop.upcycle import upcycle
    from moe_embed_jax.model_folder import open_model, place

    opened = open_model(config.init.source, positions=config.init.positions)
    if not config.init.upcycle:
        loaded = opened.load(mesh)
        params = loaded.params
        if opened.model.num_moe_layers and (
            opened.model.expert_output_bias > config.model.expert_output_bias
        ):
            _, params, size = drop_output_bias(opened.model, params)
            print(f"init        output bias of the experts dropped (root mean square {size:.2g})")
    else:
        loaded = opened.load(single_device_mesh())
        _, params = upcycle(loaded.model, loaded.params, upcycle_config(config))
        params = place(params, config.model, mesh)
    if loaded.mlm_head is None:
        return {"encoder": params}
    everywhere = replicated(mesh)
    head = jax.tree.map(lambda a: to_devices(np.asarray(a), everywhere), loaded.mlm_head)
    return {"encoder": params, "head": head}
