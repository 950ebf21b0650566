import ast
import dataclasses
import pathlib

import pytest

from moe_embed_jax import config as config_files
from moe_embed_jax import launching
from moe_embed_jax.errors import UserError
from moe_embed_jax.interop import upcycle
from moe_embed_jax.models import encoder_config, upcycle_config
from moe_embed_jax.models.moe import GELU_MLP
from moe_embed_jax.planning import request, steps
from moe_embed_jax.recipe.config import Recipe
from moe_embed_jax.routing import exchange
from moe_embed_jax.training.run_config import RUN_CONFIGS, RunConfig

NO_RUNS = ("recipe", "evaluation")  # test_recipe.py, test_suite.py
PAGES_OF_RUNS = (pathlib.Path(__file__).parent.parent / "configs").glob("*.py")
CONFIGS = sorted(path for path in PAGES_OF_RUNS if path.stem not in NO_RUNS)


def write(tmp_path, text) -> str:
    path = tmp_path / "config.py"
    path.write_text(text)
    return str(path)


def load(tmp_path, values: dict, **overrides) -> RunConfig:
    path = write(tmp_path, f"def get_config(variant=''):\n    return {values!r}\n")
    return config_files.load(RunConfig, path, overrides)


# What a page asks its user for.
GIVEN = {
    "pretrain": {"data.vocabulary.path": "sentencepiece.model"},
    "mlm": {"init.source": "xlm-roberta-base"},
    "finetune": {"init.source": "runs/pretrain", "data.pairs": "mined"},
}
TRAINED = {"data": {"vocabulary": {"kind": "train", "size": 100}}}


def test_names_in_configs_are_those_of_the_functions():
    """They stand twice: checking a config must not import the functions, which need jax."""
    for name in encoder_config.BACKENDS:
        layer = exchange.Experts(name, "ring", 1.0).layer(GELU_MLP)
        assert layer.func.__name__ == name
    assert tuple(exchange.EXCHANGES) == encoder_config.EXCHANGES
    assert tuple(upcycle.RULES) == upcycle_config.MODES
    assert tuple(steps.STEPS) == request.STEPS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_has_a_smoke_variant_and_says_how_to_run_it(path):
    given = GIVEN.get(path.stem, {})
    full = config_files.load(RUN_CONFIGS, str(path), given)
    smoke = config_files.load(RUN_CONFIGS, f"{path}:smoke", given)
    assert smoke.steps <= 10 < full.steps
    assert f"launch/train.py --config=configs/{path.name}" in path.read_text()
    with pytest.raises(UserError, match="unknown variant 'nonsense'"):
        config_files.load(RUN_CONFIGS, f"{path}:nonsense", given)


def variants(path: pathlib.Path) -> list[str]:
    """Of a page: those that its code compares `variant` with, and ""."""
    return sorted(
        {
            node.value
            for compare in ast.walk(ast.parse(path.read_text()))
            if isinstance(compare, ast.Compare) and getattr(compare.left, "id", "") == "variant"
            for node in ast.walk(compare)
            if isinstance(node, ast.Constant)
        }
        | {""}
    )


def leaves(section, prefix: str = ""):
    """(key, value) of every leaf of a page; a table such as `loss.dims` is one."""
    for key, value in dict(section).items():
        is_section = hasattr(value, "items") and key not in ("rates", "dims", "set")
        yield from leaves(value, f"{prefix}{key}.") if is_section else [(prefix + key, value)]


PAGES_OF_ALL = [*CONFIGS, CONFIGS[0].parent / "recipe.py"]


@pytest.mark.parametrize("path", PAGES_OF_ALL, ids=lambda path: path.stem)
def test_a_page_states_what_differs_from_the_defaults(path):
    """In one of its variants at least: the variants change each other's values."""
    differs = {}
    for variant in variants(path):
        classes = Recipe if path.stem == "recipe" else RUN_CONFIGS
        cls, page = config_files.read_config_file(classes, f"{path}:{variant}")
        default = dict(leaves(config_files.defaults(cls)))
        for key, value in leaves(page):
            differs[key] = differs.get(key, False) or value != default[key]
    differs.pop("objective", None)  # by which its class is chosen
    assert [key for key in differs if not differs[key]] == []


COMPUTES = {
    f"model.{field.name}"
    for field in dataclasses.fields(encoder_config.EncoderConfig)
    if field.metadata.get("computes")
}
OF_EXPERTS = (
    *("model.num_experts", "model.experts_per_token", "model.normalize_gates", "loss.balance"),
    "model.shared_expert_width",
    *("model.expert_backend", "model.expert_exchange", "model.capacity_factor"),
)
# (when training ignores a key, which)
IGNORED = (
    (
        lambda config: config.init.source,
        lambda key: key.startswith("model.") and key not in COMPUTES,
    ),
    (lambda config: config.init.source, lambda key: key.startswith("data.vocabulary")),
    (lambda config: getattr(config.data, "pairs", ""), lambda key: key == "data.mixture"),
    (lambda config: not config.model.moe_every, lambda key: key in OF_EXPERTS),
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_page_states_nothing_that_training_ignores(path):
    for variant in variants(path):
        cls, page = config_files.read_config_file(RUN_CONFIGS, f"{path}:{variant}")
        given = {}
        if page.get("init", {}).get("required"):
            given = {"init.source": "m", "data.pairs": "p"}
        elif "vocabulary" not in page.get("data", {}):
            given = {"data.vocabulary.path": "x"}
        config = config_files.fill(cls, page, given)
        for is_so, ignored in IGNORED:
            wrong = [key for key, _ in leaves(page) if is_so(config) and ignored(key)]
            assert wrong == [], f"{path.name}:{variant}"


def test_mlm_has_the_papers_figures():
    """paper_facts (b): stage 1; Adam as the code's mmlm.yaml, of which the paper says nothing."""
    path = CONFIGS[0].parent / "mlm.py"
    config = config_files.load(RUN_CONFIGS, str(path), GIVEN["mlm"])
    assert (config.batch_size, config.data.row_length, config.steps) == (4096, 2048, 10_000)
    optimizer = config.optimizer
    assert optimizer.peak_learning_rate == 4e-4
    assert (optimizer.schedule, optimizer.warmup_steps, optimizer.clip_norm) == ("linear", 500, 1.0)
    assert (optimizer.b1, optimizer.b2, optimizer.epsilon) == (0.9, 0.98, 1e-6)
    assert optimizer.weight_decay == 0.0
    loss = config.loss
    assert (loss.mask_rate, loss.mask_share, loss.random_share) == (0.3, 0.8, 0.1)
    assert (config.data.language_exponent, config.data.one_language) == (0.3, True)
    assert (config.model.moe_every, config.model.rotary_base) == (0, 10_000.0)
    assert config.init.positions == "rotary" and not config.data.across_documents


def test_a_page_chooses_its_keys_by_its_objective(tmp_path):
    path = write(tmp_path, "def get_config(variant=''):\n    return {'objective': 'masked'}\n")
    with pytest.raises(UserError, match="objective='masked': choose one of contrastive, masked_lm"):
        config_files.load(RUN_CONFIGS, path, {})
    pairs_key = {"objective": "masked_lm", "data": {"query_length": 3}}
    path = write(tmp_path, f"def get_config(variant=''):\n    return {pairs_key!r}\n")
    with pytest.raises(UserError, match=r"unknown config key data\.query_length"):
        config_files.load(RUN_CONFIGS, path, {})


def test_pretrain_has_the_papers_figures():
    """paper_facts (c): stage 2 hyper-parameters; (a): architecture."""
    path = CONFIGS[0].parent / "pretrain.py"
    config = config_files.load(RunConfig, str(path), {"data.vocabulary.path": "x"})
    assert config.batch_size == 16_384
    assert (config.data.query_length, config.data.document_length) == (32, 256)
    optimizer = config.optimizer
    assert optimizer.peak_learning_rate == 8e-5
    assert (optimizer.schedule, optimizer.warmup_steps) == ("cosine", 1000)
    assert (optimizer.b1, optimizer.b2, optimizer.epsilon) == (0.9, 0.999, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.01, 1.0)
    assert config.steps == 1_600_000_000 // 16_384  # one epoch of 1.6 B pairs
    assert (config.loss.temperature, config.loss.balance) == (0.02, 1.0)
    model = dataclasses.asdict(config.model)
    released = dict(
        vocab_size=250_048,
        num_layers=12,
        width=768,
        num_heads=12,
        ffn_width=3072,
        num_experts=8,
        experts_per_token=2,
        moe_every=2,
        rotary_base=10_000.0,
        norm_epsilon=1e-5,
    )
    assert {key: model[key] for key in released} == released


def test_unknown_keys_are_named_with_the_nearest_known(tmp_path):
    with pytest.raises(
        UserError, match=r"unknown config key model\.widht; did you mean model\.width"
    ):
        load(tmp_path, TRAINED | {"model": {"widht": 3}})
    with pytest.raises(UserError, match=r"unknown config key loss\.zzz; known keys: temperature"):
        load(tmp_path, TRAINED, **{"loss.zzz": "1"})


def test_types_are_checked_and_integers_become_floats(tmp_path):
    config = load(tmp_path, TRAINED, **{"loss.temperature": "1", "optimizer.schedule": "linear"})
    assert config.loss.temperature == 1.0 and isinstance(config.loss.temperature, float)
    assert config.optimizer.schedule == "linear"
    with pytest.raises(UserError, match=r"steps='ten' is a str; it must be a int"):
        load(tmp_path, TRAINED, steps="ten")
    with pytest.raises(UserError, match=r"model=3 must be a section with keys"):
        load(tmp_path, TRAINED | {"model": 3})
    with pytest.raises(UserError, match=r"expert_bias=1 is a int; it must be a bool"):
        load(tmp_path, TRAINED, **{"model.expert_bias": "1"})


def test_files_that_are_no_configs(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.py does not exist"):
        config_files.load(RunConfig, str(tmp_path / "nothing.py"), {})
    with pytest.raises(UserError, match=r"does not define get_config"):
        config_files.load(RunConfig, write(tmp_path, "x = 1\n"), {})
    with pytest.raises(UserError, match=r"get_config must return a dict, not 3"):
        config_files.load(RunConfig, write(tmp_path, "def get_config(v): return 3\n"), {})
    with pytest.raises(UserError, match=r"config key 3 must be a string"):
        config_files.load(RunConfig, write(tmp_path, "def get_config(v): return {3: 4}\n"), {})
    with pytest.raises(UserError, match=r"line 2: ZeroDivisionError: division by zero"):
        config_files.load(RunConfig, write(tmp_path, "def get_config(v):\n  return 1 / 0\n"), {})
    with pytest.raises(UserError, match=r"line 1: SyntaxError: ") as refused:
        config_files.load(RunConfig, write(tmp_path, "def get_config(v:\n"), {})
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"optimizer": {"schedule": "magic"}}, "optimizer.schedule='magic'"),
        ({"data": {"vocabulary": {"kind": "hub"}}}, "data.vocabulary.kind='hub'"),
        ({"data": {"vocabulary": {"kind": "file"}}}, "data.vocabulary.path is empty"),
    ],
)
def test_impossible_values(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, TRAINED | values)


def test_command_line(tmp_path):
    path = write(tmp_path, f"def get_config(variant=''):\n    return {TRAINED!r}\n")
    flags = launching.parser("test")
    flags.add_argument("--workdir", required=True)
    arguments = ["--config", path, "--workdir=w", "--config.steps", "7", "--config.model.width=96"]
    namespace, config = launching.parse_with_config(flags, RunConfig, arguments)
    assert (namespace.workdir, config.steps, config.model.width) == ("w", 7, 96)
    for bad, message in [
        (["--confg=x"], "the following arguments are required: --config"),
        ([f"--config={path}", "--stps=3"], "unknown argument --stps=3"),
        ([f"--config={path}", "--config.steps"], "--config.steps needs a value"),
    ]:
        flags = launching.parser("test")
        with pytest.raises(UserError, match=message):
            launching.parse_with_config(flags, RunConfig, bad)


def test_differences_and_atomic_json(tmp_path):
    old, new = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4, "d": 3}, "e": 5}
    assert config_files.differences(old, new) == ["b.c: 2 -> 4", "e: (absent) -> 5"]
    config_files.save_json(tmp_path / "x" / "y.json", new)
    assert (tmp_path / "x" / "y.json").read_text().startswith("{")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["y.json"]


@dataclasses.dataclass(frozen=True)
class Open:
    """A page with a section of any keys."""

    size: int = 1
    set: dict = dataclasses.field(default_factory=dict)


def test_a_section_of_any_keys_is_merged(tmp_path):
    path = write(tmp_path, "def get_config(v=''): return {'set': {'a': {'b': 1, 'c': {'x': 1}}}}\n")
    assert config_files.load(Open, path, {}).set == {"a": {"b": 1, "c": {"x": 1}}}
    merged = config_files.load(Open, path, {"set.a.b": "2", "set.new.key": "text"})
    assert merged.set == {"a": {"b": 2, "c": {"x": 1}}, "new": {"key": "text"}}
    whole = config_files.load(Open, path, {"set.a.c": "{'y': 2}", "set.a.b": "{'z': 3}"})
    assert whole.set == {"a": {"b": {"z": 3}, "c": {"y": 2}}}  # literals replace
    assert config_files.load(Open, path, {"set.a": "None"}).set == {"a": None}
    with pytest.raises(UserError, match="unknown config key sise; did you mean size"):
        config_files.load(Open, path, {"sise": "2"})
