"""Golden texts, which every runtime embeds to be compared, and the file of the right answers.

20 scripts, characters that tokenizers disagree about, markup, a text that is cut, an empty one.
"""

import dataclasses
import json
import pathlib

import numpy as np

from moe_embed_jax import storage

FILE = "golden.json"
LONG, EMPTY = "long", "empty"  # the texts that some servers refuse instead of embedding them
MARKUP = "markup"  # which some tokenizers read as control tokens

SCRIPTS = {
    "latin": "How do I set the volume of the loudspeaker?",
    "latin, marks": "Žluťoučký kůň přes řeku; où est l'hôtel à Zürich? Đường phố ở Hà Nội.",
    "cyrillic": "Как настроить громкость динамика?",
    "greek": "Πώς ρυθμίζω την ένταση του ήχου;",
    "armenian": "Ինչպե՞ս կարգավորել ձայնը։",
    "georgian": "როგორ დავაყენო ხმის სიმაღლე?",
    "hebrew": "איך מכוונים את עוצמת הקול?",
    "arabic": "كيف أضبط مستوى الصوت؟ ١٢٣",
    "devanagari": "मैं आवाज़ की तीव्रता कैसे बदलूँ?",
    "bengali": "আমি কীভাবে শব্দের মাত্রা ঠিক করব?",
    "gujarati": "હું અવાજ કેવી રીતે બદલું?",
    "tamil": "ஒலி அளவை எப்படி அமைப்பது?",
    "telugu": "ధ్వని స్థాయిని ఎలా మార్చాలి?",
    "kannada": "ಧ್ವನಿ ಮಟ್ಟವನ್ನು ಹೇಗೆ ಹೊಂದಿಸುವುದು?",
    "malayalam": "ശബ്ദം എങ്ങനെ ക്രമീകരിക്കാം?",
    "thai": "ปรับระดับเสียงลำโพงอย่างไร",
    "khmer": "តើខ្ញុំកំណត់កម្រិតសំឡេងយ៉ាងដូចម្តេច?",
    "hangul": "스피커 음량을 어떻게 설정하나요?",
    "japanese": "スピーカーの音量を設定するにはどうすればいいですか。",
    "han": "如何设置扬声器的音量？",
    "ethiopic": "የድምፅ መጠን እንዴት አስተካክላለሁ?",
}
ODD = {
    "white space": "  two  spaces,\ta tab,\na line,\r\nanother\u00a0one\u3000here \u2028 ",
    "emoji": "👩🏽\u200d🚀 launched 🇨🇭 at 10 °C ☃️",
    "compatibility forms": "ﬁne Ⅷ ｆｕｌｌ ｗｉｄｔｈ ﷺ ㎏ ① ½",
    "combining marks": "e\u0301 a\u0308\u0301 o\u0302\u0323 q\u0307\u0323",
    "unseen": "zero\u200bwidth\ufeff soft\u00adhyphen \u200frtl\u200e end",
    "control": "bell\u0007 escape\u001b[0m delete\u007f",
    MARKUP: '<s>bold</s> <mask> <pad> </s> [CLS] [SEP] <br/> &amp; "{}"',
    "code": "def f(x): return {k: v**2 for k, v in x.items() if v != 0}  # O(n)",
    "numbers": "3.14159e-10 + 1,000,000.50 = 0x1F4A9; +41 44 668 18 00",
    "rare": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𠜎 ꙮ",
    "one letter": "x",
    "no spaces": "pneumonoultramicroscopicsilicovolcanoconiosis" * 3,
}


@dataclasses.dataclass(frozen=True)
class Golden:
    """A text, what it is called in reports, and the prompt that it is embedded with."""

    name: str
    prompt: str
    text: str


def golden_texts(max_length: int) -> list[Golden]:
    """All texts, queries and documents in turn; the long one has more than `max_length` tokens."""
    words = " ".join(SCRIPTS.values()).split()
    long = " ".join((words * (max_length // len(words) + 1))[: max_length + 16])
    texts = [*SCRIPTS.items(), *ODD.items(), (EMPTY, ""), (LONG, long)]
    prompts = ("query", "document")
    return [Golden(name, prompts[i % 2], text) for i, (name, text) in enumerate(texts)]


def golden_vectors(embedder, texts: list[Golden]) -> np.ndarray:
    """What an `Embedder` makes of the texts, each with its prompt: float32 [texts, D]."""
    vectors = np.zeros((len(texts), embedder.width), np.float32)
    for prompt in dict.fromkeys(golden.prompt for golden in texts):
        own = [i for i, golden in enumerate(texts) if golden.prompt == prompt]
        own_texts = [texts[i].text for i in own]  # one of them is cut, which is what it is for
        vectors[own] = embedder.encode(own_texts, prompt, on_truncation="ignore")
    return vectors


def write_golden(folder: pathlib.Path, texts: list[Golden], reference, result) -> None:
    """golden.json in `folder`: prefixes, and of every text its ids and vector of `result`.

    Args:
      reference: an `Embedder`.
      result: its `compare.Result`.
    """
    prefixes = {name: reference.prefix(name) for name in ("query", "document")}
    lines = [
        json.dumps(
            {
                **dataclasses.asdict(golden),
                "ids": ids,
                "vector": [float(f"{x:.8g}") for x in np.float64(vector)],
            }
        )
        for golden, ids, vector in zip(texts, result.ids, result.vectors, strict=True)
    ]
    head = json.dumps({"prefixes": prefixes, "width": reference.width})[:-1]
    content = head + ', "texts": [\n' + ",\n".join(lines) + "\n]}\n"
    storage.write(folder / FILE, content)
