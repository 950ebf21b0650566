"""Language codes as data sets have them (de, deu, deu_Latn) to one form, by langcodes."""

import functools

import langcodes

PART_OF = {"Hang": "Kore"}  # scripts that are a part of another: Hangul of Korean's


@functools.cache
def language_tag(code: str, merged: bool = False) -> str:
    """ISO 639-3 and script, as in MTEB's results: "de" -> "deu-Latn"; an unknown code stays.

    `merged`: varieties become the language that they are commonly called ("arb" and "ara" are
    "ara-Arab"), so that the same language of different data sets is the same.
    """
    try:
        tag = langcodes.standardize_tag(code.replace("_", "-"), macro=merged)
        language = langcodes.Language.get(tag, normalize=merged).maximize()
        script = PART_OF.get(language.script, language.script) if merged else language.script
        return f"{language.to_alpha3()}-{script}"
    except (langcodes.LanguageTagError, LookupError):
        return code
