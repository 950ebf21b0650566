"""configs/recipe.py: which steps a config gives, and what is refused before anything runs."""

import pytest
from conftest import ROOT

from moe_embed_jax import config as config_files
from moe_embed_jax import storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.recipe import config, steps
from moe_embed_jax.recipe.inputs import last_scores


def load(variant="small", **overrides) -> config.Recipe:
    overrides = {key.replace("__", "."): value for key, value in overrides.items()}
    return config_files.load(config.Recipe, f"{ROOT}/configs/recipe.py:{variant}", overrides)


def table(recipe, workdir="runs/r") -> dict[str, steps.Step]:
    made = steps.make_steps(recipe, storage.path(workdir), ROOT / "launch", ROOT)
    return {step.name: step for step in made}


def test_small_is_a_chain_of_all_steps():
    of_small = table(load())
    assert list(of_small) == [
        *("prepare", "stage1", "teacher", "filter"),
        *("stage2", "mine", "stage3", "evaluate", "export"),
    ]
    assert of_small["stage2"].needs == ("stage1", "filter")
    assert of_small["stage2"].arguments["init"]["source"] == "WORKDIR/stage1"
    assert of_small["stage2"].arguments["init"]["upcycle"] == "paper"
    assert of_small["stage3"].arguments["loss"]["dims"] == {"128": 1.0, "32": 1.0}
    assert of_small["evaluate"].arguments["dim"] == "128,32"
    # A work directory may be moved: what a step was made with stays the same.
    for elsewhere in ("elsewhere", "gs://bucket/recipe"):
        moved = table(load(), elsewhere)
        assert {n: s.arguments for n, s in moved.items()} == {
            name: step.arguments for name, step in of_small.items()
        }


GIVEN = {"prepare__sources": "s.json", "stage1__set__data__texts": "runs/texts"}


def test_modern_is_the_papers_chain_with_more():
    of_modern, of_paper = table(load("modern", **GIVEN)), table(load("paper", **GIVEN))
    assert [name for name in of_modern if name not in of_paper] == ["merge", "stage4"]
    for name in ("prepare", "stage1", "filter", "mine"):
        assert of_modern[name] == of_paper[name]
    stage2, stage3, stage4 = (of_modern[f"stage{i}"].arguments for i in (2, 3, 4))
    assert stage2["loss"]["distillation"]["vectors"] == 1
    assert "--config.data.teacher=runs/r/filtered.work" in of_modern["stage2"].commands[0].argv
    assert stage3["loss"]["distillation"]["scores"] == 1 and stage3["loss"]["quantisation"] is None
    argv = " ".join(of_modern["stage3"].commands[0].argv)
    assert "data.teacher" not in argv  # it learns scores, which the pairs have
    for name in ("stage3", "stage4"):
        assert "--config.data.pairs=runs/r/mined" in of_modern[name].commands[0].argv
    merge = of_modern["merge"]
    assert merge.arguments == {
        "model": "WORKDIR/stage3",
        "steps": [3500, 4000, 4022],
        "method": "average",
    }
    assert "--source=runs/r/stage3@4022" in merge.commands[0].argv and merge.needs == ("stage3",)
    assert of_modern["stage4"].needs == ("merge", "mine")
    assert stage4["init"]["source"] == "WORKDIR/merged"
    assert stage4["loss"]["quantisation"] == {"float32": 1.0, "int8": 1.0, "binary": 1.0}
    assert stage4["loss"]["dims"] == stage3["loss"]["dims"] == {"768": 1.0, "256": 1.0}
    assert stage4["loss"]["distillation"] == stage3["loss"]["distillation"]
    small = table(load("modern_small"))
    models = ["stage1", "stage2", "stage3", "merged", "stage4"]
    assert [*steps.models_of(small.values())] == models
    outputs = [command.output.stem for command in small["evaluate"].commands]
    assert outputs == ["bm25", *models] and small["evaluate"].needs[-2:] == ("merge", "stage4")
    assert small["evaluate"].arguments["dim"] == "128,32"
    assert small["evaluate"].arguments["index"] == "float32,int8,binary"
    assert "index" not in table(load("small"))["evaluate"].arguments
    assert small["export"].needs == ("stage4",) and small["mine"].needs == ("filter", "teacher")
    assert small["merge"].arguments["steps"] == [90, 105, 120]
    without = table(load("modern_small", merge__checkpoints="0"))
    assert "merge" not in without and without["stage4"].needs == ("stage3", "mine")
    assert without["stage4"].arguments["init"]["source"] == "WORKDIR/stage3"


def test_the_papers_rules():
    of_paper = table(load("", **GIVEN))
    assert of_paper == table(load("paper", **GIVEN))
    assert "teacher" not in of_paper  # from the hub
    arguments = of_paper["filter"].arguments
    assert arguments["teacher"] == "hf://intfloat/multilingual-e5-small"
    assert (arguments["k"], arguments["chunk"], arguments["margin"]) == (2, 1_000_000, 0.0)
    arguments = of_paper["mine"].arguments
    assert (arguments["count"], arguments["relative"], arguments["search"]) == (10, 0.95, 1_000)
    assert of_paper["stage1"].arguments["steps"] == 10_000
    assert of_paper["stage2"].arguments["batch_size"] == 16_384
    assert of_paper["stage3"].arguments["loss"]["dims"] == {"768": 1.0, "256": 1.0}


def test_fields_of_the_stages_can_be_changed():
    recipe = load(stage2__set__batch_size="64", stage3__set__loss__dims="{'64': 1.0}")
    changed = table(recipe)
    assert changed["stage2"].arguments["batch_size"] == 64
    assert changed["stage2"].arguments["steps"] == 200  # the page's other changes stay
    assert changed["stage3"].arguments["loss"]["dims"] == {"64": 1.0}
    assert changed["evaluate"].arguments["dim"] == "64"
    assert load(stage2__set__data__rates="None").stage2.set["data"]["rates"] is None


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("", {}, "give --config.prepare.sources=FILE"),
        ("", {"prepare__sources": "s"}, "--config.stage1.set.data.texts=... is to be given: a fol"),
        ("small", {"prepare__sources": "s"}, "prepare.sources and prepare.mixture: both are given"),
        ("small", {"filter__kk": "3"}, "unknown config key filter.kk; did you mean filter.k"),
        ("small", {"stage2__page": "a.py"}, "key stage2.page; did you mean stage2.config"),
        ("small", {"stage2__set__stepps": "3"}, r"stage2 .*unknown config key stepps; did you mea"),
        ("small", {"stage2__set__init__source": "x"}, "stage2.set.init.source: the recipe decides"),
        ("small", {"stage2__config": "configs/no.py"}, "stage2 .*no.py does not exist"),
        ("small", {"teacher": "nowhere"}, "teacher='nowhere' is no model folder"),
        ("small", {"teacher": "stage2"}, "teacher='stage2' is no model folder"),
        ("large", {}, "unknown variant 'large' of configs/recipe.py; there are: paper, small"),
        ("small", {"merge__checkpoints": "1"}, "merge.checkpoints=1 must be 0"),
        ("small", {"merge__checkpoints": "4"}, "merge.checkpoints=4: stage3 keeps 3 .steps=120"),
        ("modern_small", {"merge__method": "slerp"}, "slerp merges two models, not 3"),
        ("small", {"stage4__set__steps": "3"}, "stage4.config is empty: give a config file"),
        ("small", {"stage3__set__data__teacher": "x"}, "stage3.set.data.teacher: the recipe dec"),
    ],
)
def test_mistakes_are_named_before_anything_runs(variant, changes, message):
    with pytest.raises(UserError, match=message):
        table(load(variant, **changes))


@pytest.mark.parametrize(
    ("variant", "changes", "step", "message"),
    [
        ("small", {"evaluate__beir": "a,b"}, "evaluate", "evaluate.beir=a: a: no such folder"),
        ("small", {"mine__pairs": "no"}, "mine", "mine.pairs=no: no/manifest.json is missing"),
        (
            "paper",
            {"prepare__sources": "s", "stage1__set__data__texts": "no"},
            "stage1",
            "stage1.set.data.texts=no: no/manifest.json is missing",
        ),
    ],
)
def test_inputs_of_later_steps(variant, changes, step, message):
    with pytest.raises(UserError, match=message):
        table(load(variant, **changes))[step].inputs[0].check()


def test_another_recipe_is_looked_for(tmp_path):
    with pytest.raises(UserError, match=f"evaluate.beside={tmp_path}: no finished recipe"):
        last_scores(str(tmp_path))
