"""Keys of LLaMA-Factory's data, generation and benchmark arguments."""

from finetune_cli.convert.table import Key, Kind, no_effect, parts, refused, translated

_CACHE = "tokenised data is cached by its content, so a stale cache cannot be read"
_TEMPLATE = "`--chat-template FILE` with a Jinja template that does it"

DATA: tuple[Key, ...] = (
    translated(
        "template",
        Kind.TEXT,
        None,
        "model.chatTemplate",
        "llama2, llama3, codellama, chatml, qwen, mistral, gemma and llava by name; a template that only repeats what the model's"
        " tokenizer has: the tokenizer's own, with a note; others need `--chat-template`",
    ),
    translated("dataset", Kind.NAMES, None, "datasets.train", "names in `dataset_info.json`"),
    translated(
        "eval_dataset",
        Kind.NAMES,
        None,
        "datasets.evaluation",
        "names in `dataset_info.json`; `humaneval` and `mbpp` become benchmarks, although LLaMA-Factory does not have them",
    ),
    translated("dataset_dir", Kind.ANY, "data", "datasets", "where `dataset_info.json` is; files need `--data-uri`"),
    translated(
        "media_dir", Kind.TEXT, None, "datasets", "only the data sets' own folder: images lie beside the records"
    ),
    translated(
        "cutoff_len",
        Kind.INT,
        2048,
        "training.maxLength, training.overlong",
        "longer samples are cut by share, as LLaMA-Factory does",
        least=8,
        most=1048576,
    ),
    translated("train_on_prompt", Kind.BOOL, False, "training.trainOnPrompt"),
    translated("mask_history", Kind.BOOL, False, "training.maskHistory"),
    translated(
        "mix_strategy",
        Kind.TEXT,
        "concat",
        "datasets.train[].weight",
        "concat: no weights; interleave_under and interleave_over: weights, with an epoch of as many rows as all sets together",
        choices=("concat", "interleave_under", "interleave_over", "interleave_once"),
    ),
    translated("interleave_probs", Kind.NAMES, None, "datasets.train[].weight"),
    translated("max_samples", Kind.INT, None, "datasets.*[].maxSamples", least=1),
    translated(
        "packing",
        Kind.BOOL,
        None,
        "training.packing",
        "packed samples never see each other here, as with `neat_packing`",
    ),
    translated("neat_packing", Kind.BOOL, False, "training.packing"),
    translated(
        "enable_thinking",
        Kind.BOOL,
        True,
        "model.chatTemplate",
        "true: the template decides; false needs `--chat-template`",
    ),
    no_effect("streaming", Kind.BOOL, False, "data are memory-mapped, so what does not fit in memory trains too"),
    no_effect("buffer_size", Kind.INT, 16384, "the order is a random one over all data, not one inside a buffer"),
    no_effect("overwrite_cache", Kind.BOOL, False, _CACHE),
    no_effect("tokenized_path", Kind.TEXT, None, f"{_CACHE}; it is kept beside the `hf://` downloads (`cache.uri`)"),
    no_effect("data_shared_file_system", Kind.BOOL, False, "it changes who tokenises, not the result"),
    no_effect("preprocessing_batch_size", Kind.INT, 1000, "it changes how fast data are tokenised, not the result"),
    no_effect("preprocessing_num_workers", Kind.INT, None, "it changes how fast data are tokenised, not the result"),
    refused(
        "eval_on_each_dataset",
        Kind.BOOL,
        False,
        "the held-out loss is one, over all evaluation sets together",
        "one set in `eval_dataset`",
    ),
    refused(
        "val_size",
        Kind.FLOAT,
        0.0,
        "no records are split off the training data",
        "a file with the held-out records, named in `eval_dataset`",
    ),
    refused(
        "ignore_pad_token_for_loss",
        Kind.BOOL,
        True,
        "padding never counts in the loss",
        "remove the line",
        off=(True, None),
    ),
    refused(
        "tool_format",
        Kind.TEXT,
        None,
        "how tools are written is the chat template's matter",
        "a template that writes them so, with `--chat-template FILE`",
    ),
    refused(
        "default_system",
        Kind.TEXT,
        None,
        "no system message is added to records that have none",
        f"a `system` column in the data, or {_TEMPLATE}",
    ),
    refused(
        "preserve_thinking", Kind.BOOL, False, "thoughts in earlier turns are the chat template's matter", _TEMPLATE
    ),
)

_GENERATION = "HumanEval and MBPP: "
GENERATION: tuple[Key, ...] = (
    translated(
        "do_sample", Kind.BOOL, True, "evaluation.generation.temperature", f"{_GENERATION}false is temperature 0"
    ),
    translated(
        "temperature", Kind.FLOAT, 0.95, "evaluation.generation.temperature", f"{_GENERATION}if it is set", least=0
    ),
    translated("top_p", Kind.FLOAT, 0.7, "evaluation.generation.topP", f"{_GENERATION}if it is set", least=0, most=1),
    translated(
        "max_new_tokens", Kind.INT, 1024, "evaluation.generation.maxNewTokens", f"{_GENERATION}if it is set", least=1
    ),
    *(
        no_effect(name, kind, default, "text is generated only for HumanEval and MBPP, and there without it")
        for name, kind, default in (
            ("top_k", Kind.INT, 50),
            ("num_beams", Kind.INT, 1),
            ("max_length", Kind.INT, 1024),
            ("repetition_penalty", Kind.FLOAT, 1.0),
            ("length_penalty", Kind.FLOAT, 1.0),
            ("skip_special_tokens", Kind.BOOL, True),
            ("eval_num_beams", Kind.INT, None),
            ("generation_max_length", Kind.INT, None),
            ("generation_num_beams", Kind.INT, None),
            ("generation_config", Kind.ANY, None),
        )
    ),
)

BENCHMARK: tuple[Key, ...] = (
    refused(
        "task",
        Kind.TEXT,
        None,
        "benchmarks of multiple choice are not run",
        "`eval_dataset` with a held-out file, or with humaneval or mbpp",
    ),
    *parts(
        "task",
        "it is for `llamafactory-cli eval`",
        ("task_dir", Kind.TEXT, "evaluation"),
        ("batch_size", Kind.INT, 4),
        ("lang", Kind.TEXT, "en"),
        ("n_shot", Kind.INT, 5),
        ("save_dir", Kind.TEXT, None),
        ("download_mode", Kind.TEXT, "reuse_dataset_if_exists"),
    ),
)
