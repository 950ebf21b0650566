"""A small multilingual MoE embedder, trained on a laptop in minutes.

    python launch/train.py --config=configs/quickstart.py --workdir=runs/quickstart

Variants: `:smoke` (a few steps of a tiny model on the same data, for tests), `:further` (the same
training, from the model that `init.source` names; it decides architecture and vocabulary). A field
that is not here has its default (training/run_config.py).

What to expect on 2 CPU cores: see the table in README.md.
"""

from ml_collections import ConfigDict

from moe_embed_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.batch_size = 256  # pairs per step; every query sees the 255 other documents
    config.steps = 240
    config.eval_every = 120  # retrieval on some held-out languages
    config.eval_languages = 6
    config.checkpoint_every = 120

    config.data = ConfigDict()
    config.data.document_length = 64  # the paper has 256; most of these texts are shorter
    # Share of the batches of each task; by rows, API documentation would be 36 % of them.
    config.data.rates = dict(translations=0.6, descriptions=0.16, aws_api=0.12, google_api=0.12)
    config.data.row_length = 64  # short rows: attention is the costly part of a small model
    config.data.texts_per_row = 8

    config.optimizer = ConfigDict()
    config.optimizer.peak_learning_rate = 2e-3  # small models like large steps
    config.optimizer.warmup_steps = 20

    if variant == "further":
        config.init = ConfigDict(dict(required=True))
        return config
    config.data.vocabulary = ConfigDict(dict(kind="train", size=16_384))
    # The second of 2 layers has experts: 8, of which a token gets 2. In the same minutes 4 layers
    # see half of the pairs, and are worse on every set.
    config.model = ConfigDict()
    config.model.vocab_size = 16_384  # as data.vocabulary.size
    config.model.num_layers = 2
    config.model.width = 128
    config.model.num_heads = 4
    config.model.ffn_width = 256
    if variant == "smoke":
        config.batch_size = 16
        config.steps = 4
        config.log_every = 2
        config.eval_every = 2
        config.eval_languages = 2
        config.checkpoint_every = 2
        config.data.row_buckets = 1  # one program: a few steps mostly compile
        config.model.width = 32
        config.model.num_heads = 2
        config.model.ffn_width = 64
        config.optimizer.warmup_steps = 1
    elif variant:
        raise UserError(
            f"unknown variant {variant!r} of configs/quickstart.py; there are: smoke, further"
        )
    return config
