"""Stage 2 of the paper: weakly supervised contrastive pretraining of the 475M model.

    python launch/train.py --config=configs/pretrain.py --workdir=runs/pretrain \\
        --config.data.vocabulary.path=sentencepiece.bpe.model

475,292,928 parameters, 305,423,616 active per token. Variants: `:smoke` (a few steps of a small
model of the same kind on the default data, runs on a laptop).

Figures: arXiv 2502.07972v3, section 4.3. Where the reference code did something else, the comment
says so.
"""

from ml_collections import ConfigDict

from moe_embed_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 16_384  # pairs; negatives are all other documents of the global batch
    config.steps = 97_656  # one epoch of 1.6 B pairs (code: two epochs)
    config.log_every = 50
    config.eval_every = 5_000
    config.eval_languages = 8
    config.checkpoint_every = 1_000
    config.keep_checkpoints = 3

    config.model = ConfigDict()
    config.model.vocab_size = 250_048  # XLM-R's 250,002 ids, padded to a multiple of 64
    config.model.num_layers = 12
    config.model.width = 768
    config.model.num_heads = 12
    config.model.ffn_width = 3072
    config.model.num_experts = 8
    config.model.experts_per_token = 2
    config.model.moe_every = 2  # layers 1, 3, ..., 11
    config.model.rotary_base = 10_000.0
    config.model.norm_epsilon = 1e-5
    config.model.dtype = "bfloat16"  # of activations; parameters and router are float32
    config.model.remat_rows = 128  # rows of a device whose activations exist at a time

    config.data = ConfigDict()
    config.data.mixture = "package_texts"  # the paper's 1.6 B pairs are not public
    config.data.vocabulary = ConfigDict(dict(kind="file", path=""))  # XLM-R's SentencePiece model
    config.data.query_length = 32
    config.data.document_length = 256
    config.data.language_exponent = 1.0  # every pair equally often
    config.data.row_length = 256
    config.data.texts_per_row = 32
    config.data.chunk_rows = 0  # no GradCache (nor the code in this run): remat_rows is enough

    config.optimizer = ConfigDict()
    config.optimizer.peak_learning_rate = 8e-5
    config.optimizer.schedule = "cosine"  # code: inverse_sqrt
    config.optimizer.warmup_steps = 1_000
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.epsilon = 1e-8
    config.optimizer.weight_decay = 0.01  # matrices only
    config.optimizer.clip_norm = 1.0

    config.loss = ConfigDict()
    config.loss.temperature = 0.02
    # 1 at perfect balance, over the global batch, once. Code: per device (loss.balance_over), and
    # the terms of queries and documents are added (2 at balance).
    config.loss.balance = 1.0

    config.mesh = ConfigDict()
    config.mesh.data = -1  # all devices
    config.mesh.fsdp = 1
    config.mesh.expert = 1

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
        config.data.vocabulary = ConfigDict(dict(kind="train", size=16_384))
        config.data.document_length = 64  # shares prepared data with configs/quickstart.py
        config.data.row_length = 64
        config.data.chunk_rows = 8
        config.model.remat_rows = 4
        config.optimizer.warmup_steps = 1
    elif variant:
        raise UserError(f"unknown variant {variant!r} of configs/pretrain.py; there is: smoke")
    return config
