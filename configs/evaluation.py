"""Suites of evaluation tasks.

    python launch/evaluate.py --suite=configs/evaluation.py --data=FOLDER \\
        --model=MODEL --output=results

`--data` is the folder that all paths below are in. Variants: none (sets of the project's shared
data: XQuAD, STS, Tatoeba, SIB-200 and others), `:some` (the same sets, but fewer of their many
languages), `:miracl` and `:beir` (downloads in the layouts of their makers), `:smoke` (a few
minutes of the first on 2 CPU cores). Write your own config as you like it; docs/evaluation.md says
what each kind of task reads.

What to expect: the first variant embeds 503,541 texts, 15 million tokens of multilingual-e5's:
two to three hours on 2 CPU cores with multilingual-e5-small, `:some` less than one.
"""

from moe_embed_jax.errors import UserError

XQUAD = ("ar", "de", "en", "es", "ru", "zh")
MIRACL_WITH_TRAINING_DATA = (
    *("ar", "bn", "en", "es", "fa", "fi", "fr", "hi"),
    *("id", "ja", "ko", "ru", "sw", "te", "th", "zh"),
)
BEIR_FOLDERS = {  # task, as MTEB calls it -> folder, as BEIR does
    "TRECCOVID": "trec-covid",
    "NFCorpus": "nfcorpus",
    "NQ": "nq",
    "HotpotQA": "hotpotqa",
    "FiQA2018": "fiqa",
    "ArguAna": "arguana",
    "Touche2020": "webis-touche2020",
    "QuoraRetrieval": "quora",
    "DBPedia": "dbpedia-entity",
    "SCIDOCS": "scidocs",
    "FEVER": "fever",
    "ClimateFEVER": "climate-fever",
    "SciFact": "scifact",
}


def get_config(variant: str = "") -> dict:
    """A dict keeps the order of the tasks, in which they run and are reported."""
    tasks = {}
    if variant == "":
        shared(tasks)
    elif variant == "some":
        some(tasks)
    elif variant == "miracl":
        miracl(tasks)
    elif variant == "beir":
        beir(tasks)
    elif variant == "smoke":
        smoke(tasks)
    else:
        raise UserError(
            f"unknown variant {variant!r} of configs/evaluation.py; there are: some, miracl, beir, "
            "smoke"
        )
    return {"tasks": tasks}


def shared(tasks: dict) -> None:
    """Every set of the shared data that can be scored."""
    # 240 paragraphs and 1,190 questions, the same in all languages: 36 pairs of languages.
    tasks["XQuAD"] = dict(kind="cross_lingual", path="xquad/{subset}", languages=XQUAD)

    # Retrieval in one language, which is English where none is named. The names of two sets end in
    # "train"; no model here has seen them.
    tasks["Cranfield"] = dict(kind="retrieval", path="cranfield")
    tasks["CACM"] = dict(kind="retrieval", path="cacm")
    tasks["QuestionParagraph"] = dict(
        kind="retrieval",
        path="qa_retrieval/{subset}",
        languages=dict(
            zh_cmrc2018_dev="zh", ar_arcd_train="ar", th_iapp_valid="th", th_iapp_train="th"
        ),
    )

    # As MTEB: STS-B and its translations; the sets of a SemEval year are one.
    tasks["STSBenchmarkMultilingual"] = dict(kind="sts", path="sts/stsb/{subset}.test.tsv.gz")
    tasks["JSTS"] = dict(
        kind="sts", path="sts/jsts/valid.tsv.gz", languages="ja", split="validation"
    )
    tasks["KorSTS"] = dict(kind="sts", path="sts/korsts/test.tsv.gz", languages="ko")
    # MTEB's STS12 has MSRvid too, which is not there.
    tasks["STS12withoutMSRvid"] = dict(
        kind="sts", path="sts/sts12-16/2012.*.tsv.gz", languages="en"
    )
    for year in (13, 14, 15, 16):
        path = f"sts/sts12-16/20{year}.*.tsv.gz"
        tasks[f"STS{year}"] = dict(kind="sts", path=path, languages="en")

    # 112 languages to English, up to 1,000 sentences each.
    tasks["Tatoeba"] = dict(
        kind="bitext", layout="table", path="bitext_tatoeba/tatoeba_v1.tsv.xz", pivot="eng"
    )
    # 1,004 sentences of FLORES-200, 77 languages to English.
    tasks["FloresToEnglish"] = dict(
        kind="bitext", layout="aligned", path="sib200_flores/{subset}.tsv.xz", pivot="eng_Latn"
    )
    # Software texts repeat themselves: where a side came before, nothing tells the translation.
    tasks["PythonDocs"] = dict(
        kind="bitext",
        layout="columns",
        path="python_docs_parallel/{subset}.tsv.xz",
        languages=("en-es", "en-ja"),
        unique=True,
    )
    tasks["TldrPages"] = dict(
        kind="bitext",
        layout="records",
        path="tldr_pages/pages.jsonl.xz",
        field="description",
        pivot="en",
        unique=True,
    )

    # Seven topics; the classifier is trained on English and tested on all 78 languages.
    tasks["SIB200Transfer"] = dict(
        kind="classification", path="sib200_flores/{subset}.tsv.xz", train="eng_Latn"
    )


def some(tasks: dict) -> None:
    """Every set of the shared data, but of the parallel ones 15 languages of many scripts and
    sizes, or 5 where the texts are software's, or 2,000 pairs where languages are few."""
    shared(tasks)
    flores = (
        *("arb_Arab", "zho_Hans", "swh_Latn", "hin_Deva", "deu_Latn", "rus_Cyrl", "jpn_Jpan"),
        *("tha_Thai", "amh_Ethi", "fra_Latn", "fin_Latn", "kor_Hang", "tam_Taml", "yor_Latn"),
        "isl_Latn",
    )
    tasks["FloresToEnglish"]["languages"] = flores
    tasks["SIB200Transfer"]["languages"] = (*flores, "eng_Latn")
    tasks["Tatoeba"]["languages"] = (
        *("ara", "cmn", "swh", "hin", "deu", "rus", "jpn", "tha"),
        *("amh", "fra", "fin", "kor", "tam", "isl", "spa"),
    )
    tasks["PythonDocs"]["first_pairs"] = 2_000
    tasks["TldrPages"]["languages"] = ("de", "es", "fr", "ja", "zh")


def miracl(tasks: dict) -> None:
    """The hub's miracl/miracl and miracl/miracl-corpus side by side in --data: 90 M passages."""
    tasks["MIRACL"] = dict(
        kind="miracl",
        topics="miracl-v1.0-{subset}/topics/topics.miracl-v1.0-{subset}-dev.tsv",
        qrels="miracl-v1.0-{subset}/qrels/qrels.miracl-v1.0-{subset}-dev.tsv",
        corpus="miracl-corpus-v1.0-{subset}/docs-*.jsonl.gz",
        languages=MIRACL_WITH_TRAINING_DATA,
    )


def beir(tasks: dict) -> None:
    """The 15 public sets of BEIR, each a folder in --data."""
    tasks["MSMARCO"] = dict(kind="retrieval", path="msmarco", split="dev")
    for task, folder in BEIR_FOLDERS.items():
        tasks[task] = dict(kind="retrieval", path=folder)
    tasks["CQADupstack"] = dict(kind="retrieval", path="cqadupstack/{subset}")


def smoke(tasks: dict) -> None:
    """A little of each kind, of the shared data."""
    tasks["XQuAD"] = dict(kind="cross_lingual", path="xquad/{subset}", languages=("en", "zh"))
    tasks["STSBenchmarkMultilingual"] = dict(
        kind="sts", path="sts/stsb/{subset}.test.tsv.gz", languages=("de",)
    )
    tasks["Tatoeba"] = dict(
        kind="bitext",
        layout="table",
        path="bitext_tatoeba/tatoeba_v1.tsv.xz",
        pivot="eng",
        languages=("amh", "fra"),
    )
    tasks["SIB200Transfer"] = dict(
        kind="classification",
        path="sib200_flores/{subset}.tsv.xz",
        train="eng_Latn",
        languages=("eng_Latn", "swh_Latn"),
    )
