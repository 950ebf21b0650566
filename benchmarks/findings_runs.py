"""The runs of findings.py: one folder per arm and seed, started, judged and read here."""

import dataclasses
import gzip
import json
import os
import pathlib
import queue
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

from findings_arms import ARMS, SETTINGS, Setting, home
from seeded_runs import ROOT, held_out_scores, launch, link, link_sets, train

from moe_embed_jax import config as config_files
from moe_embed_jax.config import save_json
from moe_embed_jax.errors import UserError
from moe_embed_jax.training.run_config import RunConfig

PAGE = ROOT / "configs/quickstart.py"


def page(arm: str) -> str:
    """The config file of an arm's run; upcycled arms start from another model."""
    return f"{PAGE}:further" if ARMS[arm].setting == "upcycled" else str(PAGE)


FROM_SCRATCH = ("scratch", "pairs")  # settings whose models are small, and cheap to judge
SCORES = "scores.json"  # the last file of a run: it is finished and judged


@dataclasses.dataclass(frozen=True)
class Place:
    """Where things are, and how much is run.

    xquad, e5, pairs: None: not judged by XQuAD; no upcycled arms; none on given pairs.
    steps: {setting: steps} where they differ from the setting's.
    reported: {(arm, seed): numbers} of runs that were made elsewhere.
    """

    work: pathlib.Path
    data_dir: pathlib.Path
    xquad: pathlib.Path | None = None
    e5: str | None = None
    pairs: pathlib.Path | None = None
    steps: dict[str, int] = dataclasses.field(default_factory=dict)
    reported: dict[tuple[str, int], dict] = dataclasses.field(default_factory=dict)

    def folder(self, arm: str, seed: int) -> pathlib.Path:
        return self.work / home(arm) / f"{arm}-{seed}"

    def steps_of(self, setting: str) -> int:
        return self.steps.get(setting, SETTINGS[setting].steps)

    def is_done(self, arm: str, seed: int) -> bool:
        return (arm, seed) in self.reported or (self.folder(arm, seed) / SCORES).exists()

    def is_possible(self, arm: str) -> bool:
        needs = {"upcycled": self.e5, "pairs": self.pairs}
        return needs.get(ARMS[arm].setting, "nothing") is not None


def overrides(place: Place, arm: str, seed: int) -> dict:
    """The keys of the run that differ from the page."""
    setting, steps = SETTINGS[ARMS[arm].setting], place.steps_of(ARMS[arm].setting)
    keys = {
        "seed": seed,
        "steps": steps,
        # In between only where it is cheap; a first and a last evaluation are always made.
        "eval_every": eval_every(ARMS[arm].setting, steps),
        "eval_languages": len(setting.sets),
        "checkpoint_every": steps,
        "keep_checkpoints": 1,
        "data.dir": str(place.work / ARMS[arm].setting / "data"),
    }
    if ARMS[arm].setting == "upcycled":
        keys["init.source"] = place.e5
    if ARMS[arm].setting == "pairs":
        keys["data.pairs"] = str(place.pairs)
        if "loss.distillation.vectors" in ARMS[arm].changes:
            keys["data.teacher"] = f"{place.pairs}.work"
    return keys | setting.config | ARMS[arm].changes


def eval_every(setting: str, steps: int) -> int:
    return max(steps // SETTINGS[setting].evaluations, 1) if setting in FROM_SCRATCH else 0


def load_config(place: Place, arm: str, seed: int = 0) -> RunConfig:
    """The config of the run as the page says it, before a model that it starts from is read."""
    texts = {key: str(value) for key, value in overrides(place, arm, seed).items()}
    return config_files.load(RunConfig, page(arm), texts)


def prepare(place: Place, setting_name: str) -> None:
    """The data folder of a setting: vocabulary and tokens, made if they are not there, and its
    held-out sets alone. What is made lies in `work`/prepared beside links to `data_dir`."""
    from moe_embed_jax.training import init, workdir

    prepared = place.work / "prepared"
    for name in ("retrieval", "tfds", "wheels"):
        if (place.data_dir / name).exists():
            link(place.data_dir / name, prepared / name)
    link_each(place.data_dir, prepared)
    statistics = place.data_dir / "statistics.json"
    if statistics.exists() and not (prepared / statistics.name).exists():
        shutil.copyfile(statistics, prepared / statistics.name)
    arm = next(name for name, arm in ARMS.items() if arm.setting == setting_name)
    config = load_config(place, arm)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=str(prepared)))
    config, _ = init.apply_source(config, place.work / "nowhere")
    workdir.prepare(config)
    folder = link_sets(place.data_dir, place.work / setting_name, SETTINGS[setting_name].sets)
    link_each(prepared, folder)


def link_each(source: pathlib.Path, target: pathlib.Path) -> None:
    """Links to each vocabulary and token store; others may be made beside them."""
    for name in ("tokens", "vocabulary"):
        for store in (source / name).glob("*"):
            link(store, target / name / store.name)


def write_xquad(place: Place, setting: Setting, name: str) -> dict[str, pathlib.Path]:
    """{"xquad/<language>": BEIR folder} with every so many of the queries."""
    folders = {}
    if place.xquad is None:
        return folders
    for language in setting.languages.split():
        source = place.xquad / language
        if not (source / "queries.jsonl.gz").is_file():
            raise UserError(f"--xquad={place.xquad} has no {language}/queries.jsonl.gz")
        folder = folders[f"xquad/{language}"] = place.work / name / "xquad" / language
        link(source / "corpus.jsonl.gz", folder / "corpus.jsonl.gz")
        with gzip.open(source / "queries.jsonl.gz", "rt") as file:
            queries = file.readlines()[:: setting.every]
        chosen = {json.loads(line)["_id"] for line in queries}
        with gzip.open(source / "qrels.tsv.gz", "rt") as file:
            head, *qrels = file.readlines()
        qrels = [line for line in qrels if line.split("\t")[0] in chosen]
        for file_name, lines in (("queries.jsonl.gz", queries), ("qrels.tsv.gz", [head, *qrels])):
            with gzip.open(folder / file_name, "wt") as file:
                file.writelines(lines)
    return folders


def run_arm(place: Place, arm: str, seed: int, xquad: dict[str, pathlib.Path]) -> None:
    """Trains and judges; returns at once if that was done before."""
    folder, setting = place.folder(arm, seed), SETTINGS[ARMS[arm].setting]
    if (folder / SCORES).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(
        os.environ,
        JAX_COMPILATION_CACHE_DIR=str(place.work / "compiled"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )
    with (folder / "log.txt").open("a") as log:
        process = dict(env=environment, stdout=log, stderr=log)
        of_training = process
        if ARMS[arm].devices > 1:
            flags = f"--xla_force_host_platform_device_count={ARMS[arm].devices}"
            flags = f"{environment.get('XLA_FLAGS', '')} {flags}".strip()
            of_training = process | {"env": environment | {"XLA_FLAGS": flags}}
        clock = time.monotonic()
        is_resumed = (folder / "metrics.jsonl").exists()
        train(folder, page(arm), overrides(place, arm, seed), **of_training)
        seconds = None if is_resumed else time.monotonic() - clock
        scores = {
            "seconds": seconds,
            "start": held_out_scores(folder, start_column(folder)),
            "held_out": {str(setting.width): held_out_scores(folder)},
            "xquad": {},
        }
        sets = dict(xquad)
        if xquad and ARMS[arm].setting in FROM_SCRATCH:  # once more, to cut the vectors too
            retrieval = place.work / ARMS[arm].setting / "data/retrieval"
            sets |= {name: retrieval / name for name in setting.sets}
        for width, found in evaluate(folder, sets, setting, process).items() if sets else ():
            for kind in ("xquad", "held_out"):
                of_kind = {n: s for n, s in found.items() if (n in xquad) == (kind == "xquad")}
                if of_kind:
                    scores[kind][width] = means(of_kind)
    save_json(folder / SCORES, scores)
    if ARMS[arm].setting == "upcycled":  # 2 GB
        shutil.rmtree(folder / "checkpoints")


def start_column(folder: pathlib.Path) -> str:
    columns = json.loads((folder / "results.json").read_text())
    return next(name for name in ("before", "untrained") if name in columns)


def evaluate(folder: pathlib.Path, sets: dict, setting: Setting, process: dict) -> dict[str, dict]:
    """{width: {set: metrics}} of launch/evaluate.py, full and narrow, in the order of `sets`."""
    output = folder / "evaluation.json"
    if not output.exists():
        flags = [f"--model={folder}", f"--dataset={','.join(map(str, sets.values()))}"]
        flags += [f"--output={output}", f"--dim={setting.width},{setting.narrow}"]
        launch("evaluate.py", flags, f"the evaluation of {folder}", **process)
    return {
        width: dict(zip(sets, found.values(), strict=True))
        for width, found in json.loads(output.read_text()).items()
    }


def means(results: dict[str, dict]) -> dict[str, float]:
    """nDCG@10 of every set, of each group (before the slash) in the mean, and over groups: "all".

    XQuAD keeps its languages, the default data's sets do not."""
    from moe_embed_jax.evaluation.retrieval import mean_over_languages

    groups = {name: mean["ndcg_at_10"] for name, mean in mean_over_languages(results).items()}
    languages = {n: m["ndcg_at_10"] for n, m in results.items() if n.startswith("xquad/")}
    return groups | languages | {"all": sum(groups.values()) / len(groups)}


def sweep(place: Place, arms: list[str], seeds: list[int], jobs: int) -> list[str]:
    """Every arm with every seed, `jobs` at a time, each on its part of the processors. A run that
    fails does not stop the others: returns what went wrong."""
    todo = [(arm, seed) for seed in seeds for arm in arms if not place.is_done(arm, seed)]
    xquad = {}
    for name in dict.fromkeys(ARMS[arm].setting for arm, _ in todo):
        prepare(place, name)
        xquad[name] = write_xquad(place, SETTINGS[name], name)
    parts: queue.Queue = queue.Queue()
    processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for job in range(jobs):
        parts.put(processors[job::jobs])
    started = time.monotonic()

    def one(index: int) -> str:
        arm, seed = todo[index]
        part = parts.get()
        if part and jobs > 1:
            os.sched_setaffinity(0, part)  # of this thread, and of the processes that it starts
        clock, error = time.monotonic(), ""
        try:
            run_arm(place, arm, seed, xquad[ARMS[arm].setting])
        except (UserError, OSError) as problem:
            error = f"{arm} with seed {seed}: {problem}"
        finally:
            parts.put(part)
        took, since = time.monotonic() - clock, time.monotonic() - started
        outcome = error or f"{arm} with seed {seed}: {took:.0f} s"
        print(f"[{index + 1} of {len(todo)}, {since / 60:.0f} min] {outcome}", flush=True)
        return error

    with ThreadPoolExecutor(jobs) as pool:
        return [error for error in pool.map(one, range(len(todo))) if error]


def read_run(place: Place, arm: str, seed: int) -> dict | None:
    """The numbers of a finished run: scores.json, the losses and loads of its steps, `evaluations`
    on the way, and `routing` by language. None: not run.

    Raises `UserError` if it took another number of steps than is asked for now.
    """
    from moe_embed_jax.models.encoder import EncoderConfig, count_params

    folder = place.folder(arm, seed)
    if found := place.reported.get((arm, seed)):
        check_steps(place, arm, f"the reported {arm}-{seed}", found["steps"])
        return found
    if not (folder / SCORES).exists():
        return None
    card = json.loads((folder / "config.json").read_text())
    check_steps(place, arm, folder, card["steps"])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    model = config_files.build(EncoderConfig, card["model"], "model")
    total, active = count_params(model)
    run = json.loads((folder / SCORES).read_text()) | {
        "seed": seed,
        "total": total,
        "active": active,
        "embeddings": model.vocab_size * model.width,
        "experts_per_token": model.experts_per_token if model.moe_every else 0,
        "batch_size": card["batch_size"],
        "steps": card["steps"],
        "tokens": sum(record["tokens"] for record in records),
        "loss": [record["contrastive_loss"] for record in records],
        "utilisation": sum(record["utilisation"] for record in records) / len(records),
        "evaluations": evaluations(folder),
    }
    if model.moe_every:
        run["load"] = [record["expert_load"] for record in records]
        run["routing"] = json.loads((folder / "routing.json").read_text())
    return run


def check_steps(place: Place, arm: str, where, steps: int) -> None:
    if steps != (asked := place.steps_of(ARMS[arm].setting)):
        raise UserError(
            f"{where} has {steps} steps, not {asked}: take another --work, or the same numbers of "
            "steps"
        )


def evaluations(folder: pathlib.Path) -> dict[int, float]:
    """{step: nDCG@10 over the held-out sets} of a run, as in `held_out_scores`."""
    lines = (folder / "evaluations.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: means(record["sets"])["all"] for record in records}
