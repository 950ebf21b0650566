"""Stage 2 of the paper: weakly supervised contrastive pretraining of the 475M model.

    python launch/train.py --config=configs/pretrain.py --workdir=runs/pretrain \\
        --config.data.vocabulary.path=sentencepiece.bpe.model

475,292,928 parameters, 305,423,616 active per token. Variants: `:smoke` (a few steps of a small
model of the same kind on the default data, runs on a laptop).

A field that is not here has its default, which is the paper's figure for this stage (arXiv
2502.07972v3, section 4.3): the architecture in models/encoder_config.py, batch, optimiser and data
in training/run_config.py, the loss in losses/contrast_config.py. The reference code trains two
epochs, with the schedule `inverse_sqrt`; it balances the experts per device
(`loss.balance_over="device"`), and adds the terms of queries and documents, so that perfect balance
is 2 there and 1 here.
"""

from ml_collections import ConfigDict

from moe_embed_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.steps = 97_656  # one epoch of 1.6 B pairs, which are not public
    config.log_every = 50
    config.eval_every = 5_000
    config.keep_checkpoints = 3

    config.model = ConfigDict()
    config.model.dtype = "bfloat16"  # of activations; parameters and router are float32
    # Rows of a device whose activations exist at a time. GradCache (data.chunk_rows) is not needed
    # then; the code has none in this run either.
    config.model.remat_rows = 128

    if variant == "smoke":
        config.batch_size = 32
        config.steps = 4
        config.log_every = 1
        config.eval_every = 2
        config.eval_languages = 2
        config.checkpoint_every = 2
        config.model.vocab_size = 16_384
        config.model.num_layers = 4
        config.model.width = 48
        config.model.num_heads = 4
        config.model.ffn_width = 96
        config.model.remat_rows = 4
        config.data = ConfigDict()
        config.data.vocabulary = ConfigDict(dict(kind="train", size=16_384))
        config.data.document_length = 64  # shares prepared data with configs/quickstart.py
        config.data.row_length = 64
        config.data.chunk_rows = 8
        config.data.row_buckets = 1  # one program: a few steps mostly compile
        config.optimizer = ConfigDict(dict(warmup_steps=1))
    elif variant:
        raise UserError(f"unknown variant {variant!r} of configs/pretrain.py; there is: smoke")
    return config
