"""The whole recipe as one chain of steps, the paper's or a modern one; a step is a launcher.

    python launch/recipe.py --config=configs/recipe.py:paper --workdir=runs/recipe \\
        --config.prepare.sources=sources.json --config.stage1.set.data.texts=runs/texts

paper: prepare -> stage1 (masked language modelling) -> filter -> stage2 (contrastive, experts made
of stage 1) -> mine -> stage3 (hard negatives, Matryoshka) -> evaluate -> export -> report.
modern: stage2 also learns the vectors of the filter's teacher, stage3 the scores of the miner's;
then merge (checkpoints of stage3) -> stage4 (quantisation-aware) -> evaluate -> export. See
docs/recipe.md. `stageN.config` is a config of launch/train.py, `stageN.set` what is changed of it.
Stages 2 and 3 start from the model of the stage before, so their configs state no architecture.
`--config.evaluate.beir` adds BEIR folders to the held-out sets of the default data. All stages are
evaluated, at the widths of stage 3's `loss.dims`. A field that is not here has its default
(recipe/config.py, curation/*_rule.py), which is the paper's.

Variants: `:paper` (also none) and `:modern` are for a TPU pod and your data; `:small` and
`:modern_small` run on the default data on two CPU cores, without a hub (the paper's in 32 minutes
where nothing else runs); `:smoke` and `:modern_smoke` are a few steps of each, for tests.

Figures: arXiv 2502.07972v3, sections 4.1 to 4.5; the configs of the stages have training's.
"""

from ml_collections import ConfigDict

from moe_embed_jax.errors import UserError

VARIANTS = {
    "": (False, ""),
    "paper": (False, ""),
    "small": (False, "small"),
    "smoke": (False, "smoke"),
    "modern": (True, ""),
    "modern_small": (True, "small"),
    "modern_smoke": (True, "smoke"),
}


def get_config(variant: str = "") -> ConfigDict:
    if variant not in VARIANTS:
        names = ", ".join(name for name in VARIANTS if name)
        raise UserError(f"unknown variant {variant!r} of configs/recipe.py; there are: {names}")
    is_modern, size = VARIANTS[variant]
    config = _paper(size)
    if is_modern:
        _modernise(config, size)
    return config


def _paper(size: str) -> ConfigDict:
    config = ConfigDict()
    config.stage1 = ConfigDict()
    config.stage1.config = "configs/mlm.py"
    config.stage1.set = ConfigDict()
    config.stage1.set.init = ConfigDict(dict(source="hf://FacebookAI/xlm-roberta-base"))
    config.stage1.set.data = ConfigDict(dict(texts=""))  # to be given: CC100, see docs/curation.md

    config.teacher = "hf://intfloat/multilingual-e5-small"  # of the filter
    config.filter = ConfigDict()
    config.filter.query_prompt = "query: "  # the teacher's
    config.filter.document_prompt = "passage: "
    config.filter.dtype = "float16"  # half the space, for billions of vectors

    config.stage2 = ConfigDict()
    config.stage2.config = "configs/pretrain.py"
    config.stage2.set = ConfigDict()
    config.stage2.set.init = ConfigDict(dict(upcycle="paper"))  # 8 experts, copies of stage 1's

    # The paper fine-tunes on other pairs than stage 2: MS MARCO, NQ, HotpotQA, FEVER,
    # MIRACL, SQuAD, StackExchange. Prepare them (launch/prepare.py) and name the folder by
    # --config.mine.pairs; else the filtered pairs are taken.
    config.mine = ConfigDict()
    # Best of the paper's ablation; most of its sets came mined by BGE-M3. The paper looks at 10,000
    # ranks: --config.mine.search=10000 takes longer, and changes only queries that find fewer
    # negatives than `count` in the first 1,000.
    config.mine.teacher = "sentence-transformers:NovaSearch/stella_en_1.5B_v5"
    config.mine.query_prompt = (
        "Instruct: Given a web search query, retrieve relevant passages that answer the query.\n"
        "Query: "
    )
    config.mine.document_prompt = "none"
    config.mine.dtype = "float16"

    config.stage3 = ConfigDict(dict(config="configs/finetune.py", set=ConfigDict()))

    if size:
        config.prepare = ConfigDict(dict(mixture="package_texts"))  # the embedded default data
        # Shares as in configs/quickstart.py. The teacher embeds some 34 pairs a second here, so
        # 12,000 of the 501,957 pairs are what fits into the time.
        config.prepare.count = 12_000
        config.prepare.rates = dict(
            translations=0.6, descriptions=0.16, aws_api=0.12, google_api=0.12
        )
        config.teacher = "wheel://multilingual-e5-small"  # from PyPI, where there is no hub
        # Stage 2's own model: it embeds these pairs in seconds, e5 would take minutes again.
        config.mine.teacher = "stage2"
        config.mine.query_prompt = "query"
        config.mine.document_prompt = "document"
    if size == "small":
        config.stage1.config = "configs/mlm.py:laptop"
        # Half the config's rows and steps: 32 rows take 2.5 s a step on two cores.
        config.stage1.set = ConfigDict(
            dict(batch_size=16, steps=200, eval_every=0, checkpoint_every=50)
        )
        config.stage2.config = "configs/quickstart.py:further"
        config.stage2.set.batch_size = 128  # languages have some 150 pairs here
        config.stage2.set.steps = 200
        config.stage2.set.eval_every = 0
        config.stage2.set.checkpoint_every = 50
        config.stage3.set = _small_finetuning()
    elif size == "smoke":
        config.prepare.count = 400
        config.stage1.config = "configs/mlm.py:smoke"
        config.stage1.set = ConfigDict()
        config.teacher = "stage1"  # no download
        config.stage2.set = _smoke_pretraining()
        config.mine.count = 3
        config.stage3.config = "configs/finetune.py:smoke"
        config.stage3.set.loss = ConfigDict(dict(dims={"32": 1.0, "16": 1.0}))
        for stage in (config.stage1, config.stage2, config.stage3):
            stage.set.steps = 2
            stage.set.eval_every = 0
    return config


def _modernise(config: ConfigDict, size: str) -> None:
    """What the recipes of 2025 and 2026 add: distillation (EmbeddingGemma, arXiv 2509.20354),
    scored negatives, a merge of checkpoints (Qwen3-Embedding, arXiv 2506.05176), and training for
    compressed indexes (pplx-embed, arXiv 2602.11151). None of them says all of its weights; these
    are ours, and were tuned nowhere."""
    # The filter's teacher has embedded the pairs anyway. With a weight of 10 the small chain's
    # vectors stayed at the teacher's mean (docs/measured/distillation.md).
    config.stage2.set.loss = ConfigDict(dict(distillation=dict(vectors=1.0)))
    scored = dict(scores=1.0)  # what the miner's teacher says of each query's hard negatives
    stage3 = config.stage3.set
    stage3.loss = stage3.get("loss", ConfigDict())
    stage3.loss.distillation = ConfigDict(scored)
    stage3.keep_checkpoints = 3
    config.merge = ConfigDict(dict(checkpoints=3))  # the last 1,500 of 4,022 steps, as they are

    # From the merged model, on the pairs of stage 3, with a small learning rate: int8 and binary
    # vectors are to become better, and float32 ones to stay.
    config.stage4 = ConfigDict(dict(config=config.stage3.config, set=stage3.to_dict()))
    stage4 = config.stage4.set
    stage4.steps = 500
    stage4.loss.quantisation = {"float32": 1.0, "int8": 1.0, "binary": 1.0}
    stage4.optimizer = stage4.get("optimizer", ConfigDict())
    stage4.optimizer.peak_learning_rate = 5e-6  # a quarter of stage 3's
    stage4.optimizer.warmup_steps = 50
    if size == "small":
        # e5 embeds the pairs a second time; the scores of stage 2 itself would teach it nothing.
        config.mine.teacher = config.teacher
        config.mine.query_prompt = config.filter.query_prompt
        config.mine.document_prompt = config.filter.document_prompt
        stage3.checkpoint_every = 15  # the last quarter of 120 steps is merged
        stage4.steps = 60
        stage4.optimizer.peak_learning_rate = 1.25e-4
        stage4.optimizer.warmup_steps = 6
    elif size == "smoke":
        config.merge.checkpoints = 2
        stage3.checkpoint_every = 1
        stage4.steps = 2
        stage4.optimizer.warmup_steps = 1


def _smoke_pretraining() -> ConfigDict:
    """configs/pretrain.py:smoke without an architecture: that comes from stage 1."""
    stage = ConfigDict()
    stage.init = ConfigDict(dict(upcycle="paper"))
    stage.batch_size = 32
    stage.log_every = 1
    stage.eval_languages = 2
    stage.checkpoint_every = 2
    stage.model = ConfigDict(dict(remat_rows=4))
    stage.data = ConfigDict(dict(document_length=64, row_length=64, chunk_rows=8, row_buckets=1))
    stage.optimizer = ConfigDict(dict(warmup_steps=1))
    return stage


def _small_finetuning() -> ConfigDict:
    """configs/finetune.py for a model of width 128 and texts of a line."""
    stage = ConfigDict()
    stage.batch_size = 32
    stage.steps = 120
    stage.log_every = 10
    stage.eval_every = 0
    stage.checkpoint_every = 40
    stage.model = ConfigDict(dict(dtype="float32", remat_rows=0))
    stage.data = ConfigDict()
    stage.data.negatives = 7
    stage.data.query_length = 32  # as stage 2's
    stage.data.document_length = 64
    stage.data.row_length = 64
    stage.data.texts_per_row = 8
    stage.optimizer = ConfigDict(dict(peak_learning_rate=5e-4, warmup_steps=12))
    stage.loss = ConfigDict(dict(dims={"128": 1.0, "32": 1.0}))
    return stage
