"""Every key that sentence-transformers and transformers write into a folder is known here.

Each is changed to another value. Honoured: what is loaded changes (or the weights no longer fit).
Refused: a line names the key. Harmless: nothing changes, for the reason beside it.
"""

import dataclasses
import json
import pathlib
import shutil

import pytest
from helpers.published_models import NOMIC, nomic_shapes, random_tensors, write_folder

from moe_embed_jax.conversion import export_model
from moe_embed_jax.errors import UserError
from moe_embed_jax.model_folder import open_model

st_folders = pytest.importorskip("helpers.st_folders")

HONOURED, REFUSED, HARMLESS = "honoured", "refused", "harmless"


def honoured(value):
    return HONOURED, value


def refused(value):
    return REFUSED, value


def harmless(value, why: str):
    assert why
    return HARMLESS, value


TRAINING = "of training"
LIBRARY = "what wrote the file, or how the library loads it"
ANY_HEAD = "no part of an embedding"
TOKENS = {name: honoured("[Q]") for name in ("cls_token", "mask_token", "sep_token", "unk_token")}
SHARED = {
    "architectures": harmless(["Other"], "model_type and the tensors decide"),
    "attention_probs_dropout_prob": harmless(0.5, TRAINING),
    "hidden_dropout_prob": harmless(0.5, TRAINING),
    "bos_token_id": harmless(7, "the tokenizer says so"),
    "eos_token_id": harmless(7, "the tokenizer says so"),
    "classifier_dropout": harmless(0.5, ANY_HEAD),
    "dtype": harmless("float16", "computation is float32"),
    "torch_dtype": harmless("float16", "computation is float32"),
    "initializer_range": harmless(0.5, TRAINING),
    "model_type": refused("gpt2"),
    "tie_word_embeddings": harmless(False, ANY_HEAD),
    "transformers_version": harmless("1.0", LIBRARY),
    "type_vocab_size": honoured(3),
    "use_cache": harmless(True, ANY_HEAD),
    "vocab_size": honoured(300),
}
BERT = SHARED | {
    "add_cross_attention": refused(True),
    "hidden_act": refused("gelu_new"),
    "hidden_size": honoured(64),
    "intermediate_size": honoured(32),
    "is_decoder": refused(True),
    "layer_norm_eps": honoured(0.1),
    "max_position_embeddings": honoured(32),
    "num_attention_heads": honoured(8),
    "num_hidden_layers": honoured(1),
    "pad_token_id": harmless(5, "padding takes no part; BERT's positions start at 0"),
    "position_embedding_type": refused("relative_key"),
}
ROBERTA = BERT | {"pad_token_id": honoured(5)}
NOMIC_KEYS = SHARED | {
    "activation_function": refused("swiglu"),
    "add_pooling_layer": harmless(True, ANY_HEAD),
    "attn_pdrop": harmless(0.5, TRAINING),
    "auto_map": harmless({}, "code of a folder is never run"),
    "causal": refused(True),
    "dense_seq_output": harmless(False, "how the reference computes it"),
    "embd_pdrop": harmless(0.5, TRAINING),
    "expert_choice_router": refused(True),
    "ffn_div": refused(2),
    "fused_bias_fc": harmless(False, "how the reference computes it"),
    "fused_dropout_add_ln": harmless(False, "how the reference computes it"),
    "hidden_act": harmless("relu", "activation_function decides"),
    "layer_norm_epsilon": honoured(0.1),
    "max_trained_positions": harmless(64, "of rotary scaling, which is refused"),
    "mlp_fc1_bias": refused(False),
    "mlp_fc2_bias": refused(False),
    "moe_every_n_layers": honoured(0),
    "moe_expert_bias": honoured(True),
    "moe_expert_output_bias": refused(False),
    "moe_impl": harmless("other", "how the reference computes it"),
    "moe_normalize_expert_weights": honoured(True),
    "moe_resid_pdrop": harmless(0.5, TRAINING),
    "moe_shared_expert_width": refused(24),  # its tensors are missing
    "moe_top_k": honoured(1),
    "n_embd": honoured(64),
    "n_head": honoured(4),
    "n_inner": honoured(32),
    "n_layer": honoured(2),
    "n_positions": harmless(64, "rotary positions know no limit; the length is said elsewhere"),
    "num_experts": honoured(2),
    "num_shared_experts": refused(1),
    "pad_token_id": harmless(5, "padding takes no part"),
    "pad_vocab_size_multiple": harmless(1, "vocab_size is the padded one"),
    "parallel_block": refused(True),
    "parallel_block_tied_norm": harmless(True, "of parallel blocks, which are refused"),
    "pooling": harmless("cls", "modules.json decides; without it this key does"),
    "prenorm": refused(True),
    "qkv_proj_bias": refused(False),
    "resid_pdrop": harmless(0.5, TRAINING),
    "rotary_emb_base": honoured(100),
    "rotary_emb_fraction": refused(0.5),
    "rotary_emb_interleaved": refused(True),
    "rotary_emb_scale_base": refused(2.0),
    "rotary_scaling_factor": refused(2.0),
    "router_aux_loss_coef": harmless(0.5, TRAINING),
    "use_flash_attn": harmless(False, "how the reference computes it"),
    "use_rms_norm": refused(True),
    "use_xentropy": harmless(False, ANY_HEAD),
}
FILES = {
    "1_Pooling/config.json": {
        "embedding_dimension": harmless(7, "the model says so"),
        "word_embedding_dimension": harmless(7, "the model says so"),
        "pooling_mode": honoured("cls"),
        "pooling_mode_cls_token": refused(True),  # beside the mean
        "pooling_mode_max_tokens": refused(True),
        "pooling_mode_mean_tokens": harmless(False, "no other one is on, so it is the mean"),
        "pooling_mode_mean_sqrt_len_tokens": refused(True),
        "pooling_mode_weightedmean_tokens": refused(True),
        "pooling_mode_lasttoken": refused(True),
        "include_prompt": refused(False),
    },
    "2_Normalize/config.json": {
        "module_input_name": refused("token_embeddings"),
        "module_output_name": refused("other"),
    },
    "config_sentence_transformers.json": {
        "__version__": harmless({}, LIBRARY),
        "default_prompt_name": refused("nobody"),
        "model_type": refused("SparseEncoder"),
        "prompts": honoured({"query": "other: "}),
        "similarity_fn_name": refused("manhattan"),
    },
    "made_by.json": {
        "command": harmless("another", "of convert, to find its work done"),
        "files": harmless({}, "of convert, to find its work whole"),
        "crc32": harmless("0", "of these files"),
    },
    "modules.json": {
        "idx": harmless(9, "the order of the list counts, as in the library"),
        "name": harmless("other", LIBRARY),
        "path": refused("nowhere"),
        "type": refused("sentence_transformers.models.CLIPModel"),
    },
    "sentence_bert_config.json": {
        "transformer_task": refused("fill-mask"),
        "modality_config": refused({"text": {"method": "get_text_features"}}),
        "module_output_name": refused("sentence_embedding"),
        "max_seq_length": honoured(9),
        "do_lower_case": honoured(True),
        "unpad_inputs": harmless(True, "how it is computed"),
        "query_length": honoured(9),
        "document_length": honoured(9),
        "query_expansion": refused({"length": 32}),
        "processing_kwargs": refused({"text": {"padding": "max_length"}}),
        "model_kwargs": refused({"output_hidden_states": True}),
        "tokenizer_args": refused({"truncation_side": "left"}),
        "config_args": harmless({"trust_remote_code": True}, "no code is run"),
    },
    "tokenizer_config.json": TOKENS
    | {
        "pad_token": honoured("[Q]"),
        "backend": harmless("other", LIBRARY),
        "is_local": harmless(False, LIBRARY),
        "local_files_only": harmless(True, LIBRARY),
        "model_input_names": harmless([], "what the library passes on"),
        "model_max_length": honoured(9),
        "padding_side": harmless("left", "each text is embedded as if it stood alone"),
        "tokenizer_class": honoured("BertTokenizer"),
        "truncation_side": refused("left"),
        "split_special_tokens": honoured(True),
        "add_bos_token": refused(False),
        "add_eos_token": refused(False),
        "additional_special_tokens": honoured(["[Q]"]),
        "extra_special_tokens": honoured(["[Q]"]),
        "added_tokens_decoder": refused({"9": {"content": "[Q]"}}),
        "clean_up_tokenization_spaces": harmless(True, "of decoding"),
    },
    "special_tokens_map.json": TOKENS | {"pad_token": honoured("[Q]")},
}
# Keys that the installed versions do not write into these folders, but others do.
ADDED = {
    "sentence_bert_config.json": [
        *("unpad_inputs", "query_length", "document_length", "query_expansion"),
        *("processing_kwargs", "model_kwargs", "tokenizer_args", "config_args", "do_lower_case"),
    ],
    "tokenizer_config.json": [
        *("split_special_tokens", "add_bos_token", "add_eos_token", "truncation_side"),
        *("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"),
        *("clean_up_tokenization_spaces", "padding_side"),
    ],
    "config.json": ["position_embedding_type"],
}
CONFIGS = {"bert": BERT, "xlmr": ROBERTA, "exported": NOMIC_KEYS, "again": NOMIC_KEYS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("keys")
    st_folders.save_model(root / "bert", vocab_size=256)
    st_folders.save_model(root / "xlmr", "XLMRoberta", vocab_size=256, pad_token_id=1)
    config = NOMIC | {"vocab_size": 256}
    write_folder(root / "source", config, random_tensors(nomic_shapes(config)))
    (root / "source" / "tokenizer.json").write_text(st_folders.word_pieces().to_str())
    export_model(root / "source", root / "exported")
    st_folders.load(root / "exported").save(str(root / "again"))
    return root


def loaded(folder: pathlib.Path):
    opened = open_model(folder)
    words = opened.vocabulary.content_hash
    model = dataclasses.asdict(opened.model)
    return model, opened.prompts, opened.max_lengths, words, opened.notes


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_of_a_folder(name, folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders / name, folder)
    before, faults = loaded(folder), []
    tables = FILES | {"config.json": CONFIGS[name]}
    files = {str(path.relative_to(folder)) for path in folder.rglob("*.json")} - {"tokenizer.json"}
    assert files <= set(tables), "files that are not in the table"
    if name == "exported":  # saved again it says the same in the library's files
        files = {"special_tokens_map.json"}
    for file in sorted(files):
        path = folder / file
        original = path.read_text()
        content = json.loads(original)
        first = content[0] if isinstance(content, list) else content
        more = ADDED.get(file, []) if name == "bert" else []
        for key in dict.fromkeys([*first, *more]):
            if key not in tables[file]:
                faults.append(f"{file}: {key}: not in the table")
                continue
            verdict, value = tables[file][key]
            changed = first | {key: value}
            whole = [changed, *content[1:]] if isinstance(content, list) else changed
            path.write_text(json.dumps(whole))
            try:
                happened = HARMLESS if loaded(folder) == before else HONOURED
            except UserError as error:
                happened = REFUSED
                assert "\n" not in str(error)
            path.write_text(original)
            # A size that is honoured no longer fits the weights.
            if happened != verdict and (verdict, happened) != (HONOURED, REFUSED):
                faults.append(f"{file}: {key}={value!r}: {happened}, not {verdict}")
    assert not faults, "\n".join(faults)
