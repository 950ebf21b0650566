"""What llama.cpp's converter makes of an exported folder, in words (tried in November 2026)."""

from moe_embed_jax.interop import nomic
from moe_embed_jax.models.encoder import EncoderConfig

DROP = "python launch/convert.py export --drop_expert_output_bias ..."


def gguf_facts(model: EncoderConfig, output_bias: float, is_bert: bool) -> list[str]:
    """Whether a GGUF file of the model is exact, why not, and what to do.

    Args:
      output_bias: root mean square of the experts' output biases.
      is_bert: the folder has the layout of BERT.
    """
    if is_bert:
        return ["GGUF: the layout is BERT's; whether llama.cpp gives equal vectors was not tried."]
    if special := nomic.extensions(model):
        return [
            f"GGUF: none. llama.cpp does not know {', '.join(special)}, and refuses the "
            "architecture `MoeEmbedModel`."
        ]
    if not model.num_moe_layers:
        return [
            "GGUF: none. llama.cpp's converter stops at rotary models without experts (an "
            "assertion about `activation_function`)."
        ]
    conversion = [
        "Conversion to GGUF: run llama.cpp's converter under transformers 4.57, which its "
        "requirements pin. From 5.5 on its AutoTokenizer meets the error that asks for "
        "`trust_remote_code`. Leave `hidden_act` in config.json: without it the converter reads "
        "other sizes (12 layers, rotary base 1000) and says nothing. Texts are cut at 512 tokens "
        "there, and more than 2,048 positions are an error.",
    ]
    if output_bias:
        return [
            "GGUF: **not exact**. llama.cpp's converter drops the output bias of the experts "
            f"(`mlp.experts.bias`, root mean square {output_bias:.2g} here), without a word. "
            f"Export without it: `{DROP}` prints what that costs. Or train with "
            "`model.expert_output_bias=False`.",
            *conversion,
        ]
    return ["GGUF: exact; equal to 5e-5 where the token ids are.", *conversion]


def ollama_fact(model: EncoderConfig, output_bias: float, is_bert: bool) -> str:
    """What Ollama, which runs GGUF files, makes of the model. Arguments as of `gguf_facts`."""
    if is_bert:
        return "Ollama was not tried."
    if nomic.extensions(model) or not model.num_moe_layers:
        return "Ollama: none, because there is no GGUF file."
    return (
        "**Ollama: wrong vectors.** Its sources (read in November 2026) split the texts of all "
        "nomic models by WordPiece, whatever their tokenizer is."
        + " Use llama.cpp's own server."
        * (output_bias == 0)
    )
